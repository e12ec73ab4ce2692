//! Where a request goes: to the daemon itself, or to a port of a sandbox; and what of a sandbox's agent is not for anybody.

use http::header::{self, HeaderMap, HeaderValue};
use percent_encoding::percent_decode_str;

use crate::server::path::is_id;
use crate::{ApiError, ErrorCode, SANDBOX_ID_HEADER, SANDBOX_PORT_HEADER};

/// Agent paths that only the daemon itself may use, E2B's and ours.
const HOST_ONLY: [&str; 10] = [
    "/init",
    "/clock",
    "/dial",
    "/prepare",
    "/freeze",
    "/unfreeze",
    "/collapse",
    "/fsfreeze",
    "/fsthaw",
    "/upgrade",
];

/// A port of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::server) struct Destination {
    pub(super) sandbox: String,
    pub(super) port: u16,
}

/// Where a request goes: to a sandbox, or (`None`) to the REST routes.
///
/// E2B's rule, for one listener that serves both: a host name that begins with `<port>-<id>.` is a sandbox's port;
/// else the two routing headers name one.
pub(in crate::server) fn destination(headers: &HeaderMap) -> Result<Option<Destination>, ApiError> {
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok())
        .unwrap_or_default();
    if let Some((port, id)) = host_label(host) {
        // Older clients append a node's name to the id.
        let id = id.split('-').next().unwrap_or_default();
        require_id(id)?;
        return Ok(Some(Destination {
            sandbox: id.to_owned(),
            port: parse_port(port)?,
        }));
    }
    let text = |name| {
        headers
            .get(name)
            .map(|value: &HeaderValue| value.to_str().unwrap_or_default())
    };
    match (text(SANDBOX_ID_HEADER), text(SANDBOX_PORT_HEADER)) {
        (None, None) => Ok(None),
        (Some(id), Some(port)) => Ok(Some(Destination {
            sandbox: id.to_owned(),
            port: parse_port(port)?,
        })),
        (id, _) => {
            let missing = if id.is_none() {
                SANDBOX_ID_HEADER
            } else {
                SANDBOX_PORT_HEADER
            };
            Err(ApiError::new(
                ErrorCode::Invalid,
                format!("missing header {missing}"),
            ))
        }
    }
}

/// `<port>` and `<id>` of `<port>-<id>.<domain>`.
fn host_label(host: &str) -> Option<(&str, &str)> {
    let (label, _) = host.split_once('.')?;
    let (port, id) = label.split_once('-')?;
    (!port.is_empty() && port.bytes().all(|b| b.is_ascii_digit())).then_some((port, id))
}

/// Refuses what can be no sandbox's id.
pub(super) fn require_id(text: &str) -> Result<(), ApiError> {
    match is_id(text) {
        true => Ok(()),
        false => Err(ApiError::new(ErrorCode::Invalid, "Invalid sandbox ID")),
    }
}

fn parse_port(text: &str) -> Result<u16, ApiError> {
    text.parse()
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| ApiError::new(ErrorCode::Invalid, "Invalid sandbox port"))
}

/// Whether `path` is one of [`HOST_ONLY`], however it is spelled.
pub(super) fn is_host_only(path: &str) -> bool {
    let decoded = percent_decode_str(path).decode_utf8_lossy();
    let mut plain = String::with_capacity(decoded.len());
    for segment in decoded.split('/').filter(|segment| !segment.is_empty()) {
        match segment {
            "." => {}
            ".." => plain.truncate(plain.rfind('/').unwrap_or(0)),
            _ => {
                plain.push('/');
                plain.push_str(&segment.to_ascii_lowercase());
            }
        }
    }
    HOST_ONLY.contains(&plain.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(host: &str, headers: &[(&'static str, &str)]) -> Result<Option<Destination>, String> {
        let mut map = HeaderMap::new();
        map.insert(header::HOST, host.parse().expect("a header value"));
        for (name, value) in headers {
            map.insert(*name, value.parse().expect("a header value"));
        }
        destination(&map).map_err(|error| error.to_string())
    }

    fn to(sandbox: &str, port: u16) -> Result<Option<Destination>, String> {
        Ok(Some(Destination {
            sandbox: sandbox.to_owned(),
            port,
        }))
    }

    #[test]
    fn a_host_label_or_both_headers_name_a_sandbox() {
        let both = [(SANDBOX_ID_HEADER, "iabc"), (SANDBOX_PORT_HEADER, "49983")];
        assert_eq!(find("8000-iabc.e2b.localhost:8443", &[]), to("iabc", 8000));
        for host in [
            "localhost:3000",
            "127.0.0.1",
            "sandbox.example.org",
            "icebox",
        ] {
            assert_eq!(find(host, &both), to("iabc", 49983), "{host}");
            assert_eq!(find(host, &[]), Ok(None), "{host}");
            assert_eq!(
                find(host, &both[..1]),
                Err("missing header e2b-sandbox-port".to_owned())
            );
            assert_eq!(
                find(host, &both[1..]),
                Err("missing header e2b-sandbox-id".to_owned())
            );
        }
        assert_eq!(
            find("8000-iabc-6532622b.example.org", &[]),
            to("iabc", 8000)
        );
        assert_eq!(
            find("8000-.example.org", &[]),
            Err("Invalid sandbox ID".to_owned())
        );
        assert_eq!(
            find("8000-iABC.example.org", &[]),
            Err("Invalid sandbox ID".to_owned())
        );
        assert_eq!(
            find("99999-iabc.example.org", &[]),
            Err("Invalid sandbox port".to_owned())
        );
        assert_eq!(find("my-host.example.org", &[]), Ok(None));
    }

    #[test]
    fn inv_42_host_only_paths_are_known_in_every_spelling() {
        for path in [
            "/init",
            "//init",
            "/init/",
            "/./init",
            "/x/../init",
            "/%69nit",
            "/INIT",
            "/%2e/prepare",
            "/fsthaw",
        ] {
            assert!(is_host_only(path), "{path}");
        }
        for path in ["/", "/health", "/files", "/initial", "/init/x"] {
            assert!(!is_host_only(path), "{path}");
        }
    }
}
