//! How clients write paths: E2B's are built from an address that people type, with a slash too many now and then, and from
//! ids that older clients put a node's name behind.
//!
//! What goes to a port of a sandbox is never touched: there, all of it means something.

use std::borrow::Cow;

use http::Uri;
use http::uri::PathAndQuery;

/// An id's letter and characters.
const ID_LENGTH: usize = 21;

/// An address as the routes know it: without empty segments, and with sandboxes by their id alone.
pub(super) fn plain(uri: &Uri) -> Option<Uri> {
    let path = uri.path();
    let segments: Vec<&str> = path.split('/').filter(|it| !it.is_empty()).collect();
    let of_sandbox = match *segments {
        ["sandboxes", ..] => Some(1),
        ["v2", "sandboxes", ..] => Some(2),
        _ => None,
    };
    let mut plain = String::with_capacity(path.len());
    for (at, segment) in segments.into_iter().enumerate() {
        plain.push('/');
        plain.push_str(match of_sandbox == Some(at) {
            true => sandbox_id(segment),
            false => segment,
        });
    }
    if plain.is_empty() {
        plain.push('/');
    }
    if plain == path {
        return None;
    }
    let plain = match uri.query() {
        Some(query) => Cow::Owned(format!("{plain}?{query}")),
        None => Cow::Borrowed(&*plain),
    };
    // Made of parts of one that was parsed, so this is one, too.
    let plain: PathAndQuery = plain.parse().ok()?;
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(plain);
    Uri::from_parts(parts).ok()
}

/// A sandbox's id of `<id>-<node>`; anything else as it is, since names have dashes, too.
pub(super) fn sandbox_id(text: &str) -> &str {
    match text.split_once('-') {
        Some((id, _)) if id.len() == ID_LENGTH && id.starts_with('i') && is_id(id) => id,
        _ => text,
    }
}

/// Whether this could be a sandbox's id: E2B's rule.
pub(super) fn is_id(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_lose_what_they_do_not_need_and_nothing_else() {
        let plain = |text: &str| {
            let uri: Uri = text.parse().expect("an address");
            plain(&uri).unwrap_or(uri).to_string()
        };
        let id = "i0123456789abcdefghij";
        for (written, wanted) in [
            ("/sandboxes", "/sandboxes"),
            ("/sandboxes/", "/sandboxes"),
            ("//v2//sandboxes/?limit=1", "/v2/sandboxes?limit=1"),
            ("/", "/"),
            ("//", "/"),
            ("/templates/a%2Fb%3Ac/", "/templates/a%2Fb%3Ac"),
            ("/sandboxes/my-web/pause", "/sandboxes/my-web/pause"),
            (
                "/templates/i0123456789abcdefghij-x",
                "/templates/i0123456789abcdefghij-x",
            ),
        ] {
            assert_eq!(plain(written), wanted);
        }
        for rest in ["", "/pause", "/connect?x=%2F"] {
            let written = format!("/v2/sandboxes/{id}-6532622b{rest}");
            assert_eq!(plain(&written), format!("/v2/sandboxes/{id}{rest}"));
        }
    }
}
