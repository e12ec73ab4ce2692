//! What commands print: data on stdout, messages on stderr, colour and progress only where a person looks.

use std::borrow::Cow;
use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use serde::Serialize;

use crate::failure::Failure;

const ERROR: Style = AnsiColor::Red.on_default().bold();
const HINT: Style = AnsiColor::Cyan.on_default().bold();
const HEADER: Style = Style::new().bold();

/// How to print.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether the user asked for JSON.
    pub(crate) fn is_json(self) -> bool {
        self.json
    }

    /// One JSON document on a line of stdout.
    pub(crate) fn document(self, value: &impl Serialize) -> io::Result<()> {
        let mut out = io::stdout().lock();
        serde_json::to_writer(&mut out, value)?;
        out.write_all(b"\n")?;
        out.flush()
    }

    /// A line of data on stdout.
    pub(crate) fn line(self, text: impl AsRef<str>) -> io::Result<()> {
        let mut out = io::stdout().lock();
        writeln!(out, "{}", text.as_ref())?;
        out.flush()
    }

    /// Something that must be told in either form: a line for people on stderr, or a document on stdout.
    pub(crate) fn announce(
        self,
        text: impl AsRef<str>,
        document: &impl Serialize,
    ) -> io::Result<()> {
        if self.json {
            return self.document(document);
        }
        self.say(text);
        Ok(())
    }

    /// A line for people, on stderr; not with `--json`.
    pub(crate) fn say(self, text: impl AsRef<str>) {
        if !self.json {
            tell(format_args!("{}", printable(text.as_ref())));
        }
    }

    /// What the user could do next, on stderr; not with `--json`.
    pub(crate) fn hint(self, text: &str) {
        if !self.json {
            tell(format_args!("{HINT}hint:{HINT:#} {}", printable(text)));
        }
    }

    /// Why the command failed, on stderr.
    pub(crate) fn failure(self, failure: &Failure) {
        let body = failure.body();
        if self.json {
            let document = serde_json::json!({ "error": body });
            tell(format_args!("{document}"));
            return;
        }
        tell(format_args!(
            "{ERROR}error:{ERROR:#} {}",
            printable(&body.message)
        ));
        for cause in &body.causes {
            tell(format_args!("  caused by: {}", printable(cause)));
        }
        if let Some(hint) = &body.hint {
            self.hint(hint);
        }
    }

    /// A bar on stderr, if a person looks at it.
    pub(crate) fn progress(self) -> Progress {
        let bar = if self.json || !io::stderr().is_terminal() {
            ProgressBar::hidden()
        } else {
            ProgressBar::new_spinner()
        };
        Progress { output: self, bar }
    }
}

/// A line on stderr. Where that cannot be written there is nobody to tell, and the exit code says the rest.
fn tell(line: std::fmt::Arguments<'_>) {
    writeln!(anstream::stderr().lock(), "{line}").ok();
}

/// How far a long command is: a bar on a terminal, else a line per stage.
pub(crate) struct Progress {
    output: Output,
    bar: ProgressBar,
}

impl Progress {
    /// A new stage began.
    pub(crate) fn stage(&self, name: &str) {
        if self.bar.is_hidden() {
            self.output.say(name);
            return;
        }
        self.bar.reset();
        self.bar.unset_length();
        self.bar.set_message(name.to_owned());
        self.bar.set_style(ProgressStyle::default_spinner());
        self.bar.enable_steady_tick(Duration::from_millis(100));
    }

    /// How far the stage is, in bytes or in things.
    pub(crate) fn advance(&self, done: u64, total: Option<u64>, bytes: bool) {
        if let Some(total) = total.filter(|total| self.bar.length() != Some(*total)) {
            self.bar.set_length(total);
            let style = ProgressStyle::with_template(if bytes {
                "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes}"
            } else {
                "{msg} {wide_bar} {pos}/{len}"
            });
            // The templates are constant; a default bar would do as well.
            self.bar
                .set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        }
        self.bar.set_position(done);
    }

    /// Something worth telling meanwhile.
    pub(crate) fn message(&self, text: &str) {
        self.bar.suspend(|| self.output.say(text));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Rows in aligned columns. The last column is not padded.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(header: &[&str]) -> Self {
        Self {
            rows: vec![header.iter().map(|&cell| cell.to_owned()).collect()],
        }
    }

    /// Without a header: for `key  value` pages.
    pub(crate) fn plain() -> Self {
        Self { rows: Vec::new() }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// Whether there is more than a header.
    pub(crate) fn has_rows(&self) -> bool {
        self.rows.len() > 1
    }

    /// Prints the table; the first row bold if it is a header.
    pub(crate) fn print(&self, header: bool) -> io::Result<()> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut out = anstream::stdout().lock();
        for (number, row) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for (at, cell) in row.iter().enumerate() {
                if at + 1 == row.len() {
                    line.push_str(cell);
                } else {
                    line.push_str(&format!("{cell:<width$}  ", width = widths[at]));
                }
            }
            let line = printable(line.trim_end());
            if header && number == 0 {
                writeln!(out, "{HEADER}{line}{HEADER:#}")?;
            } else {
                writeln!(out, "{line}")?;
            }
        }
        out.flush()
    }
}

/// What stands in a cell that has nothing to say.
pub(crate) const NONE: &str = "-";

/// How long ago `then` was, in one unit: `5s`, `3m`, `2h`, `9d`.
pub(crate) fn age(then: Timestamp) -> String {
    let seconds = Timestamp::now()
        .as_second()
        .saturating_sub(then.as_second())
        .max(0);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

/// A moment, to the second.
pub(crate) fn instant(then: Timestamp) -> String {
    then.strftime("%FT%TZ").to_string()
}

/// A time that is measured in microseconds, for people.
pub(crate) fn millis(micros: u64) -> String {
    format!("{}.{} ms", micros / 1000, micros / 100 % 10)
}

/// `text` as a terminal may show it. Some of what errors repeat was chosen by a guest or stands in a file, and must
/// not move the cursor or recolour what follows.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    let harmless = |c: char| !c.is_control() || c == '\n' || c == '\t';
    if text.chars().all(harmless) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if harmless(c) {
            shown.push(c);
        } else {
            shown.extend(c.escape_default());
        }
    }
    Cow::Owned(shown)
}

/// A number of bytes, for people.
pub(crate) fn bytes(n: u64) -> String {
    indicatif::BinaryBytes(n).to_string()
}

/// A number of MiB, for people.
pub(crate) fn mib(n: u64) -> String {
    bytes(n << 20)
}

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn what_a_terminal_would_obey_is_escaped() {
        assert_eq!(printable("two\n\tlines, ü"), "two\n\tlines, ü");
        assert_eq!(
            printable("\x1b[2Jgone\r\u{9b}1m"),
            "\\u{1b}[2Jgone\\r\\u{9b}1m"
        );
    }
}
