//! API keys: made once, shown once, kept as a hash.

use std::fmt;

use sha2::{Digest as _, Sha256};

/// The hash of a key: enough to check one, useless to present.
///
/// A plain SHA-256, where passwords need something slow: nobody can try 2^160 keys, however fast each try is, and every
/// request has one to check.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct KeyHash([u8; 32]);

/// Why a text is not a [`KeyHash`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a stored key is \"sha256:\" and 64 hexadecimal characters")]
pub struct ParseKeyHashError;

/// A new key with 160 bits from the operating system. The form is the one that E2B's SDKs insist on,
/// `^e2b_[0-9a-f]+$`.
#[must_use]
pub fn generate() -> String {
    use rand::RngExt as _;
    let bytes: [u8; 20] = rand::rng().random();
    format!("e2b_{}", hex(&bytes))
}

impl KeyHash {
    /// The hash of `key`.
    #[must_use]
    pub fn of(key: impl AsRef<[u8]>) -> Self {
        Self(Sha256::digest(key).into())
    }

    /// The text to store.
    #[must_use]
    pub fn to_text(&self) -> String {
        format!("sha256:{}", hex(&self.0))
    }
}

impl std::str::FromStr for KeyHash {
    type Err = ParseKeyHashError;
    fn from_str(text: &str) -> Result<Self, ParseKeyHashError> {
        let hex = text
            .trim()
            .strip_prefix("sha256:")
            .filter(|hex| hex.len() == 64 && hex.is_ascii())
            .ok_or(ParseKeyHashError)?;
        let mut bytes = [0; 32];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte =
                u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).map_err(|_| ParseKeyHashError)?;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyHash(…)")
    }
}

fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        write!(text, "{byte:02x}").expect("writing to a String cannot fail");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_key_is_the_keys_alone() {
        let key = generate();
        assert!(key.starts_with("e2b_") && key[4..].bytes().all(|b| b.is_ascii_hexdigit()));
        let stored: KeyHash = KeyHash::of(&key).to_text().parse().expect("what we wrote");
        assert_eq!(stored, KeyHash::of(&key));
        assert_ne!(stored, KeyHash::of("e2b_00"));
        assert_ne!(stored, KeyHash::of(""));
    }

    #[test]
    fn inv_43_a_stored_key_does_not_show_the_key() {
        let key = generate();
        let stored = KeyHash::of(&key);
        assert!(!stored.to_text().contains(&key[4..]));
        assert_eq!(format!("{stored:?}"), "KeyHash(…)");
    }

    #[test]
    fn what_is_not_a_stored_key_is_refused() {
        for text in ["", "sha256:", "sha256:zz", &"é".repeat(40)] {
            assert_eq!(text.parse::<KeyHash>(), Err(ParseKeyHashError));
        }
    }
}
