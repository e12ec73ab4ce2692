//! Signed URLs: `/files?path=…&signature=…`, for programs that know neither the sandbox nor its token. E2B's SDKs make them
//! of the address that they were given, so nothing in them names the sandbox but the signature itself: it is looked for
//! among those that the sandboxes' tokens make. The agent checks it again, and whether it is still in time.

use std::collections::HashMap;

use axum::extract::Request;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use http::Method;
use sha2::{Digest as _, Sha256};

use super::{Destination, forward};
use crate::key::KeyHash;
use crate::server::Context;
use crate::{AGENT_PORT, ApiError, ErrorCode};

const PATH: &str = "/files";

/// Whether a request that names no sandbox is for a file of one.
pub(in crate::server) fn is_signed(request: &Request) -> bool {
    request.uri().path() == PATH
}

/// Carries a request to the sandbox whose token signed it.
pub(in crate::server) async fn forward_signed(context: &Context, request: Request) -> Response {
    let Some(signed) = Signed::read(&request) else {
        return refused("missing signature query parameter");
    };
    let has = |token: &str| signed.is_by(token);
    match context.daemon.signer(&has).await {
        Some(sandbox) => {
            let port = AGENT_PORT;
            forward(context, Destination { sandbox, port }, request).await
        }
        None => refused("invalid signature"),
    }
}

fn refused(message: &str) -> Response {
    ApiError::new(ErrorCode::Unauthorized, message).into_response()
}

/// A signature, and what it is of but for the token.
struct Signed {
    signature: String,
    before: String,
    after: String,
}

impl Signed {
    fn read(request: &Request) -> Option<Self> {
        let query = request.uri().query().unwrap_or_default();
        let query: HashMap<_, _> = form_urlencoded::parse(query.as_bytes()).collect();
        let text = |name: &str| query.get(name).map_or("", |value| value);
        let operation = match *request.method() {
            Method::GET | Method::HEAD => "read",
            _ => "write",
        };
        let signature = query.get("signature")?.clone().into_owned();
        let before = format!("{}:{operation}:{}:", text("path"), text("username"));
        let expiration = query.get("signature_expiration");
        let after = expiration.map_or_else(String::new, |until| format!(":{until}"));
        Some(Self {
            signature,
            before,
            after,
        })
    }

    /// What is compared are hashes, so timing tells nothing.
    fn is_by(&self, token: &str) -> bool {
        let text = format!("{}{token}{}", self.before, self.after);
        let expected = format!("v1_{}", STANDARD_NO_PAD.encode(Sha256::digest(text)));
        KeyHash::of(expected.as_bytes()) == KeyHash::of(self.signature.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn read(method: &str, uri: &str) -> Option<Signed> {
        let request = Request::builder().method(method).uri(uri);
        Signed::read(&request.body(Body::empty()).expect("a request"))
    }

    #[test]
    fn a_signature_is_of_one_token_operation_path_and_time() {
        let uri = "/files?path=%2Fa+b&username=user&signature_expiration=7&signature=v1_SIGNATURE";
        let text = "/a b:read:user:token:7";
        let signature = STANDARD_NO_PAD.encode(Sha256::digest(text));
        let encoded: String = form_urlencoded::byte_serialize(signature.as_bytes()).collect();
        let uri = uri.replace("SIGNATURE", &encoded);
        let signed = read("GET", &uri).expect("signed");
        assert!(signed.is_by("token") && !signed.is_by("another"));
        assert!(!read("POST", &uri).expect("signed").is_by("token"));
        let later = uri.replace("expiration=7", "expiration=8");
        assert!(!read("GET", &later).expect("signed").is_by("token"));
        assert!(read("GET", "/files?path=a").is_none());
    }
}
