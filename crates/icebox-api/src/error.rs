//! The one error that leaves the daemon.

use std::error::Error;
use std::fmt;

use http::{HeaderValue, StatusCode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a client may branch on beyond the HTTP status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request itself is not acceptable.
    Invalid,
    /// No key, or not the right one.
    Unauthorized,
    /// The thing named does not exist.
    NotFound,
    /// A name prefix fits several things.
    Ambiguous,
    /// It exists already.
    AlreadyExists,
    /// It rests where the verb would bring it already.
    AlreadyThere,
    /// Its phase does not allow the verb.
    WrongPhase,
    /// Others depend on it.
    InUse,
    /// This host, VMM or driver cannot do it.
    Unsupported,
    /// The team may not have more.
    LimitReached,
    /// No space, slot or memory left.
    Exhausted,
    /// It did not answer in its time.
    Timeout,
    /// The daemon pauses what runs, and begins nothing new.
    Draining,
    /// A failure that could not be undone: only `inspect` and `destroy` work.
    Broken,
    /// Anything else.
    Internal,
    /// A code that this version does not know.
    #[serde(other)]
    Unknown,
}

/// An error as it is on the wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorBody {
    /// The HTTP status, again: E2B's JavaScript SDK reads it here.
    pub code: u16,
    /// The operation and the thing.
    pub message: String,
    /// What it came from, outermost first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<String>,
    /// What the user can do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// What a client may branch on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_code: Option<ErrorCode>,
}

/// An error on its way to a client.
#[derive(Clone, Debug)]
pub struct ApiError {
    status: StatusCode,
    body: ErrorBody,
}

impl ApiError {
    /// An error whose HTTP status follows from `code`.
    ///
    /// No permanent failure is 502, 503 or 504: SDKs retry those. They retry 429, too, where the answer does not tell them
    /// not to, as ours does: a team's limit is not over in a second.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let status = match code {
            ErrorCode::Invalid | ErrorCode::Unsupported => StatusCode::BAD_REQUEST,
            ErrorCode::Unauthorized => StatusCode::UNAUTHORIZED,
            ErrorCode::NotFound => StatusCode::NOT_FOUND,
            ErrorCode::Ambiguous
            | ErrorCode::AlreadyExists
            | ErrorCode::AlreadyThere
            | ErrorCode::WrongPhase
            | ErrorCode::InUse
            | ErrorCode::Broken => StatusCode::CONFLICT,
            ErrorCode::LimitReached => StatusCode::TOO_MANY_REQUESTS,
            ErrorCode::Exhausted | ErrorCode::Draining => StatusCode::SERVICE_UNAVAILABLE,
            ErrorCode::Timeout | ErrorCode::Internal | ErrorCode::Unknown => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
        };
        Self {
            status,
            body: ErrorBody {
                code: status.as_u16(),
                message: message.into(),
                causes: Vec::new(),
                hint: None,
                error_code: Some(code),
            },
        }
    }

    /// An error that another process of ours has told.
    #[must_use]
    pub fn from_body(body: ErrorBody) -> Self {
        let status = StatusCode::from_u16(body.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self { status, body }
    }

    /// The same error with another HTTP status.
    #[must_use]
    pub fn status(mut self, status: StatusCode) -> Self {
        self.status = status;
        self.body.code = status.as_u16();
        self
    }

    /// An error of `code` that says what `error` says, with its chain of causes.
    #[must_use]
    pub fn from_error(code: ErrorCode, error: &dyn Error) -> Self {
        let mut this = Self::new(code, error.to_string());
        let mut cause = error.source();
        while let Some(error) = cause {
            this.body.causes.push(error.to_string());
            cause = error.source();
        }
        this
    }

    /// Adds what the user can do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.body.hint = Some(hint.into());
        self
    }

    /// What goes on the wire.
    #[must_use]
    pub fn body(&self) -> &ErrorBody {
        &self.body
    }

    /// What goes on the wire, by value.
    #[must_use]
    pub fn into_body(self) -> ErrorBody {
        self.body
    }

    /// The HTTP status.
    #[must_use]
    pub fn status_code(&self) -> StatusCode {
        self.status
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.body.message)
    }
}

impl Error for ApiError {}

impl axum::response::IntoResponse for ApiError {
    fn into_response(self) -> axum::response::Response {
        let mut response = (self.status, axum::Json(self.body)).into_response();
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            let headers = response.headers_mut();
            headers.insert("should-retry", HeaderValue::from_static("false"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_repeats_the_status_and_leaves_out_what_is_empty() {
        let error = ApiError::new(ErrorCode::NotFound, "sandbox \"x\" does not exist");
        assert_eq!(
            serde_json::to_string(error.body()).expect("plain data"),
            r#"{"code":404,"message":"sandbox \"x\" does not exist","error_code":"not_found"}"#
        );
    }

    #[test]
    fn a_code_of_a_newer_daemon_is_read_as_unknown() {
        let body: ErrorBody =
            serde_json::from_str(r#"{"code":418,"message":"m","error_code":"teapot"}"#)
                .expect("an unknown code is no parse error");
        assert_eq!(body.error_code, Some(ErrorCode::Unknown));
    }
}
