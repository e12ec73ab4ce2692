//! An access token that does not end up in a log.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A shared secret. `Debug` hides it, comparison takes the same time wherever two tokens differ.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Token(String);

impl Token {
    /// Wraps `secret`, which must be a valid HTTP header value.
    pub fn new(secret: impl Into<String>) -> Self {
        Self(secret.into())
    }

    /// The secret itself.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether `candidate` is this token. The time it takes tells the length of the token, nothing else.
    #[must_use]
    pub fn matches(&self, candidate: &[u8]) -> bool {
        let secret = self.0.as_bytes();
        if secret.len() != candidate.len() {
            return false;
        }
        let difference = secret
            .iter()
            .zip(candidate)
            .fold(0, |acc, (a, b)| acc | (a ^ b));
        std::hint::black_box(difference) == 0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::Token;

    #[test]
    fn inv_43_debug_hides_the_secret() {
        assert!(!format!("{:?}", Token::new("hunter2")).contains("hunter2"));
    }

    #[test]
    fn matches_only_itself() {
        let token = Token::new("abc");
        assert!(token.matches(b"abc"));
        for other in [&b""[..], b"ab", b"abd", b"abcd"] {
            assert!(!token.matches(other));
        }
    }
}
