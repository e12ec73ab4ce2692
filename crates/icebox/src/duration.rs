//! Lengths of time as people write them: `90s`, `10m`, `1h 30m`, `7d`, `2 weeks`.

use jiff::{Span, SpanRelativeTo};

/// Parses a length of time into seconds. A day has 24 hours; months and years are no length of time.
pub(crate) fn seconds(text: &str) -> Result<i64, String> {
    const EXPECTED: &str = "expected a length of time: 90s, 10m, 1h30m, 7d";
    let span: Span = text.parse().map_err(|_| EXPECTED.to_owned())?;
    let length = span.to_duration(SpanRelativeTo::days_are_24_hours());
    let length = length.map_err(|_| EXPECTED.to_owned())?;
    Ok(length.as_secs())
}

/// A length of time in seconds, for people, as [`seconds`] reads it.
pub(crate) fn length(seconds: i64) -> String {
    let units = [("w", 604_800), ("d", 86400), ("h", 3600), ("m", 60)];
    let unit = units
        .into_iter()
        .find(|(_, unit)| seconds != 0 && seconds % unit == 0);
    let (name, unit) = unit.unwrap_or(("s", 1));
    format!("{}{name}", seconds / unit)
}

#[cfg(test)]
mod tests {
    use super::{length, seconds};

    #[test]
    fn lengths_are_read_as_they_are_written() {
        for (text, expected) in [
            ("90s", 90),
            ("10m", 600),
            ("1h30m", 5400),
            ("1h 30m", 5400),
            ("7d", 604_800),
            ("2 weeks", 1_209_600),
        ] {
            assert_eq!(seconds(text), Ok(expected), "{text}");
            assert_eq!(seconds(&length(expected)), Ok(expected), "{text}");
        }
        for bad in ["", "10", "soon", "1 month", "1y"] {
            assert!(seconds(bad).is_err(), "{bad:?}");
        }
    }
}
