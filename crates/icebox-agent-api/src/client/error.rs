//! What a call to an agent can fail with.

use std::time::Duration;

use connectrpc::{ConnectError, ErrorCode};
use http::Response;
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;

use super::{MAX_REPLY_BYTES, connector::BoxError};
use crate::control::ErrorBody;

/// Why a call to an agent failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// No connection, or one that broke before an answer came.
    #[error("failed to {operation}: the agent cannot be reached")]
    Unreachable {
        operation: &'static str,
        source: BoxError,
    },
    /// The agent, or a proxy in front of it, said no. `message` is theirs.
    #[error("failed to {operation}: {message}")]
    Refused {
        operation: &'static str,
        status: u16,
        message: String,
    },
    /// A Connect error. `NotFound` and `PermissionDenied` from a start mean what 127 and 126 mean to a shell.
    /// The answer is told whole here, and is therefore no cause to be told after it.
    #[error("failed to {operation}: {}", .answer.message.as_deref().unwrap_or(.answer.code.as_str()))]
    Rpc {
        operation: &'static str,
        answer: ConnectError,
    },
    #[error("failed to {operation}: no answer within {after:?}")]
    TimedOut {
        operation: &'static str,
        after: Duration,
    },
    /// The answer makes no sense.
    #[error("failed to {operation}: unexpected answer: {message}")]
    Protocol {
        operation: &'static str,
        message: String,
    },
}

impl AgentError {
    /// The Connect code, where there is one.
    #[must_use]
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Rpc { answer, .. } => Some(answer.code),
            _ => None,
        }
    }

    /// The HTTP status of a refusal of a plain HTTP call.
    #[must_use]
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }
}

pub(super) fn rpc(operation: &'static str) -> impl FnOnce(ConnectError) -> AgentError {
    move |answer| AgentError::Rpc { operation, answer }
}

/// Turns an answer that is no success into the error it carries.
pub(super) async fn failure_of(
    operation: &'static str,
    response: Response<Incoming>,
) -> AgentError {
    let status = response.status();
    let body = match Limited::new(response.into_body(), MAX_REPLY_BYTES)
        .collect()
        .await
    {
        Ok(body) => body.to_bytes(),
        Err(error) => {
            return AgentError::Protocol {
                operation,
                message: error.to_string(),
            };
        }
    };
    let message = serde_json::from_slice::<ErrorBody>(&body).map_or_else(
        |_| format!("{status}: {}", String::from_utf8_lossy(&body)),
        |error| error.message,
    );
    AgentError::Refused {
        operation,
        status: status.as_u16(),
        message,
    }
}
