//! Sizes on the command line: what is typed, MiB or a number with a suffix; and what is shown of what things occupy.

use icebox_api::types::Part;

use crate::output::bytes;

/// Parses `512`, `512M`, `2G` or `1T` into MiB. A negative number is passed on: the daemon refuses it with words.
pub(super) fn mib(text: &str) -> Result<i64, String> {
    let (number, factor) = match text.char_indices().next_back() {
        Some((at, 'M' | 'm')) => (&text[..at], 1),
        Some((at, 'G' | 'g')) => (&text[..at], 1 << 10),
        Some((at, 'T' | 't')) => (&text[..at], 1 << 20),
        _ => (text, 1),
    };
    number
        .parse::<i64>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        .ok_or_else(|| "expected a number of MiB, or one with a suffix M, G or T".to_owned())
}

/// What something occupies, as rows of its page.
pub(super) fn space(
    allocated: Option<u64>,
    shared: Option<u64>,
    parts: &[Part],
) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    rows.extend(allocated.map(|n| ("allocated", format!("{}, its own", bytes(n)))));
    rows.extend(shared.map(|n| ("shared", format!("{}, which others need, too", bytes(n)))));
    for part in parts {
        let others = match part.shared_with.len() {
            0 => String::new(),
            1..=3 => format!("  with {}", part.shared_with.join(", ")),
            more => format!("  with {} and {} more", part.shared_with[0], more - 1),
        };
        rows.push((
            "uses",
            format!("{}  {}{others}", part.object, bytes(part.allocated_bytes)),
        ));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::mib;

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(mib("512"), Ok(512));
        assert_eq!(mib("512M"), Ok(512));
        assert_eq!(mib("2g"), Ok(2048));
        assert_eq!(mib("1T"), Ok(1 << 20));
        assert_eq!(mib("-1"), Ok(-1));
        for bad in ["", "M", "1.5G", "2K", "é", "9223372036854775807G"] {
            assert!(mib(bad).is_err(), "{bad:?}");
        }
    }
}
