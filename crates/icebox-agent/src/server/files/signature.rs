//! Signed URLs: a file for whoever has the URL, without the token.
//!
//! The signature is `v1_` and the unpadded base64 of the SHA-256 of `path:operation:user:token[:expiration]`, made by
//! the SDKs from the access token they hold. The texts of the refusals are part of the protocol.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use icebox_agent_api::Token;
use sha2::{Digest as _, Sha256};

use super::{FileQuery, Operation};

/// Why a request without the token is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("missing signature query parameter")]
    Missing,
    #[error("invalid signature")]
    Invalid,
    #[error("signature is already expired")]
    Expired,
}

/// Checks the signature of a request. A sandbox that has no token yet has no valid signatures.
pub(super) fn check(
    token: Option<&Token>,
    query: &FileQuery,
    operation: Operation,
) -> Result<(), Refusal> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    check_at(
        token,
        query,
        operation,
        i64::try_from(now).unwrap_or(i64::MAX),
    )
}

fn check_at(
    token: Option<&Token>,
    query: &FileQuery,
    operation: Operation,
    now: i64,
) -> Result<(), Refusal> {
    let given = query.signature.as_deref().ok_or(Refusal::Missing)?;
    let expected = sign(token.ok_or(Refusal::Invalid)?, query, operation);
    if !Token::new(expected).matches(given.as_bytes()) {
        return Err(Refusal::Invalid);
    }
    match query.signature_expiration {
        Some(expiration) if expiration < now => Err(Refusal::Expired),
        _ => Ok(()),
    }
}

fn sign(token: &Token, query: &FileQuery, operation: Operation) -> String {
    let path = query.path.as_deref().unwrap_or_default();
    let user = query.username.as_deref().unwrap_or_default();
    let operation = match operation {
        Operation::Read => "read",
        Operation::Write => "write",
    };
    let mut text = format!("{path}:{operation}:{user}:{}", token.expose());
    if let Some(expiration) = query.signature_expiration {
        text.push_str(&format!(":{expiration}"));
    }
    format!("v1_{}", STANDARD_NO_PAD.encode(Sha256::digest(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(signature: Option<&str>, expiration: Option<i64>) -> FileQuery {
        FileQuery {
            path: Some("/tmp/a".into()),
            username: Some("user".into()),
            signature: signature.map(Into::into),
            signature_expiration: expiration,
        }
    }

    #[test]
    fn inv_42_only_the_right_signature_opens() {
        let token = Token::new("secret");
        // printf '/tmp/a:read:user:secret' | openssl dgst -sha256 -binary | base64 | tr -d =
        let known = "v1_cggvCTz5NFcD31MGup9dfc6bI+j03yDok1VpYt2y3sY";
        assert_eq!(sign(&token, &query(None, None), Operation::Read), known);
        let check =
            |query: &FileQuery, operation, now| check_at(Some(&token), query, operation, now);
        assert_eq!(check(&query(Some(known), None), Operation::Read, 0), Ok(()));
        assert_eq!(
            check(&query(Some(known), None), Operation::Write, 0),
            Err(Refusal::Invalid)
        );
        assert_eq!(
            check(&query(Some(known), Some(10)), Operation::Read, 0),
            Err(Refusal::Invalid)
        );
        assert_eq!(
            check(&query(None, None), Operation::Read, 0),
            Err(Refusal::Missing)
        );
        assert_eq!(
            check_at(None, &query(Some(known), None), Operation::Read, 0),
            Err(Refusal::Invalid)
        );
        let timed = sign(&token, &query(None, Some(10)), Operation::Read);
        assert_eq!(
            check(&query(Some(&timed), Some(10)), Operation::Read, 10),
            Ok(())
        );
        assert_eq!(
            check(&query(Some(&timed), Some(10)), Operation::Read, 11),
            Err(Refusal::Expired)
        );
    }
}
