//! The `Range` header (RFC 9110, 14.2), as far as it is asked for: one range of bytes.

/// What part of a file is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Whole,
    /// From `first` to `last`, both included, and both within the file.
    Bytes {
        first: u64,
        last: u64,
    },
    /// A range that the file does not reach.
    Unsatisfiable,
}

/// Reads the header for a file of `size` bytes. What is not understood, several ranges included, may be answered with
/// the whole.
pub(super) fn parse(header: &str, size: u64) -> Part {
    let Some((first, last)) = header
        .strip_prefix("bytes=")
        .and_then(|range| range.trim().split_once('-'))
    else {
        return Part::Whole;
    };
    match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) if last < first => Part::Whole,
        (Ok(first), _) if first >= size => Part::Unsatisfiable,
        (Ok(first), Ok(last)) => Part::Bytes {
            first,
            last: last.min(size - 1),
        },
        (Ok(first), Err(_)) if last.is_empty() => Part::Bytes {
            first,
            last: size - 1,
        },
        (Err(_), Ok(0)) if first.is_empty() => Part::Unsatisfiable,
        (Err(_), Ok(_)) if first.is_empty() && size == 0 => Part::Unsatisfiable,
        (Err(_), Ok(length)) if first.is_empty() => Part::Bytes {
            first: size.saturating_sub(length),
            last: size - 1,
        },
        _ => Part::Whole,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_clipped_to_the_file() {
        let bytes = |first, last| Part::Bytes { first, last };
        for (header, part) in [
            ("bytes=0-0", bytes(0, 0)),
            ("bytes=2-", bytes(2, 9)),
            ("bytes=2-100", bytes(2, 9)),
            ("bytes=-3", bytes(7, 9)),
            ("bytes=-100", bytes(0, 9)),
            ("bytes=10-", Part::Unsatisfiable),
            ("bytes=-0", Part::Unsatisfiable),
            ("bytes=5-2", Part::Whole),
            ("bytes=0-1,4-5", Part::Whole),
            ("bytes=-", Part::Whole),
            ("lines=1-2", Part::Whole),
            ("bytes=18446744073709551616-", Part::Whole),
        ] {
            assert_eq!(parse(header, 10), part, "{header}");
        }
        assert_eq!(parse("bytes=0-", 0), Part::Unsatisfiable);
        assert_eq!(parse("bytes=-1", 0), Part::Unsatisfiable);
    }
}
