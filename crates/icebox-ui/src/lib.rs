//! The dashboard's files: HTML, a style sheet and plain ES modules, part of the program that serves them.
//!
//! There is no build step and nothing of others: what is in `www` is what a browser gets. The pages are as public as
//! the program itself and know nothing; what they show they ask of the API, with the key that their user has. How they
//! are served, and what they are forbidden, is the server's part.

use std::fmt::Write as _;
use std::sync::LazyLock;

use sha2::{Digest as _, Sha256};

/// One file.
#[derive(Debug)]
pub struct File {
    /// Its path below the dashboard's own.
    pub path: &'static str,
    /// For `Content-Type`.
    pub content_type: &'static str,
    /// Its bytes.
    pub content: &'static [u8],
    /// For `ETag`, quotes included: the same for the same bytes, whichever build served them.
    pub etag: String,
}

impl File {
    fn new(path: &'static str, content: &'static [u8]) -> Self {
        let content_type = match path.rsplit_once('.') {
            Some((_, "html")) => "text/html; charset=utf-8",
            Some((_, "css")) => "text/css; charset=utf-8",
            Some((_, "js")) => "text/javascript; charset=utf-8",
            Some((_, "svg")) => "image/svg+xml",
            _ => "application/octet-stream",
        };
        let mut etag = String::from("\"");
        for byte in &Sha256::digest(content)[..16] {
            // Writing to a string cannot fail.
            write!(etag, "{byte:02x}").ok();
        }
        etag.push('"');
        Self {
            path,
            content_type,
            content,
            etag,
        }
    }
}

/// The file at `path` below the dashboard's own; that of the page itself is empty.
#[must_use]
pub fn file(path: &str) -> Option<&'static File> {
    let path = match path {
        "" => "index.html",
        path => path,
    };
    FILES.iter().find(|file| file.path == path)
}

macro_rules! embedded {
    ($($path:literal),+ $(,)?) => {
        [$(($path, include_bytes!(concat!("../www/", $path)) as &'static [u8])),+]
    };
}

static FILES: LazyLock<Vec<File>> = LazyLock::new(|| {
    let files = embedded![
        "api.js",
        "app.js",
        "chart.js",
        "dialog.js",
        "dom.js",
        "envd.js",
        "events.js",
        "files.js",
        "format.js",
        "history.js",
        "icon.svg",
        "index.html",
        "lineage.js",
        "live.js",
        "run.js",
        "sandbox.js",
        "sandboxes.js",
        "style.css",
        "templates.js",
        "terminal.js",
        "verbs.js",
        "vt.js",
    ];
    let files = files.into_iter();
    files
        .map(|(path, content)| File::new(path, content))
        .collect()
});

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_file_that_is_there_is_served() {
        let www = concat!(env!("CARGO_MANIFEST_DIR"), "/www");
        let there: BTreeSet<String> = std::fs::read_dir(www)
            .expect("the directory")
            .map(|entry| entry.expect("an entry").file_name())
            .map(|name| name.into_string().expect("a plain name"))
            .collect();
        let served: BTreeSet<String> = FILES.iter().map(|file| file.path.to_owned()).collect();
        assert_eq!(there, served);
    }

    #[test]
    fn a_file_has_its_type_and_a_tag_of_its_own() {
        let page = file("").expect("the page");
        assert_eq!(page.path, "index.html");
        assert_eq!(page.content_type, "text/html; charset=utf-8");
        let tags: BTreeSet<&str> = FILES.iter().map(|file| file.etag.as_str()).collect();
        assert_eq!(tags.len(), FILES.len());
        assert!(tags.iter().all(|tag| tag.len() == 34));
        assert!(file("../Cargo.toml").is_none());
    }

    /// The server forbids the pages whatever is inline and everybody else's, so that what a guest says can do nothing: the
    /// pages must not need it.
    #[test]
    fn nothing_is_inline_or_of_another_host_or_made_of_text() {
        for file in FILES.iter() {
            let text = std::str::from_utf8(file.content).expect("text");
            for never in [
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "eval(",
                "new Function",
                "<style",
                " style=\"",
                "localStorage",
                "document.cookie",
            ] {
                assert!(!text.contains(never), "{}: {never}", file.path);
            }
            let scripts = text.matches("<script").count();
            let named = text.matches("<script type=\"module\" src=\"").count();
            assert_eq!(scripts, named, "{}", file.path);
            let foreign = text.match_indices("://").filter(|(at, _)| {
                !text[..*at].ends_with("http") || !text[at + 3..].starts_with("www.w3.org/")
            });
            assert_eq!(foreign.count(), 0, "{}", file.path);
        }
    }
}
