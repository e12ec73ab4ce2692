//! The document of the API against the API: Schemathesis makes requests of what it says, as good ones and as bad ones, and
//! looks whether the answers are what it says.
//!
//! It comes from where this machine's pip takes packages, once, and is kept beside the fixtures.

use std::process::Command;

use serde_json::Value;

use crate::support::{Daemon, python, request, succeed};

const SCHEMATHESIS: &str = "schemathesis==4.32.5";

/// What every answer is held against. Not among them is whether what is refused and what is taken is what the document says:
/// more is refused than a schema can say, and what is not known is ignored.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,\
     response_headers_conformance,unsupported_method,allow_header_conformance,ignored_auth,use_after_free";

/// 501 is what is said of parts of E2B's that are not here, and 503 that no more sandboxes fit.
const SETTINGS: &str = r#"
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "501", "503"]

[auth.openapi.key]
api_key = "${ICEBOX_KEY}"
"#;

#[test]
fn the_api_is_what_its_document_says() {
    let daemon = Daemon::start().with_template();
    let settings = daemon.path("schemathesis.toml");
    std::fs::write(&settings, SETTINGS).unwrap();
    let url = format!("http://{}/openapi.json", daemon.address());
    let mut schemathesis = Command::new(python(SCHEMATHESIS).join("bin/st"));
    schemathesis
        .arg("--config-file")
        .arg(&settings)
        .args(["run", &url, "--checks", CHECKS])
        .args(["--phases", "examples,coverage,fuzzing"])
        .args(["--max-examples", "8", "--seed", "1", "--max-failures", "20"])
        .args(["--generation-database", "none", "--no-shrink"])
        .args(["--request-timeout", "120"])
        // It has no end.
        .args(["--exclude-path", "/events"])
        .env("ICEBOX_KEY", daemon.api_key())
        .current_dir(daemon.path(""));
    succeed(&mut schemathesis);
}

#[test]
fn the_document_and_its_page_are_there_for_everybody() {
    let daemon = Daemon::start();
    let page = request(&daemon.address(), "GET /docs", "", "");
    let (head, page) = page.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert!(head.contains("content-security-policy: default-src 'none'"));
    // Everything is in it, or comes from here.
    assert!(!page.contains("http://") && !page.contains("https://") && !page.contains("//cdn"));
    let document = request(&daemon.address(), "GET /openapi.json", "", "");
    let (head, document) = document.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("content-type: application/json"), "{head}");
    let document: Value = serde_json::from_str(document).unwrap();
    assert_eq!(document["openapi"], "3.1.0");
    let create = &document["paths"]["/v2/sandboxes"]["post"];
    let made = &create["responses"]["201"]["content"]["application/json"]["schema"]["$ref"];
    assert_eq!(made, "#/components/schemas/SandboxDetail");
}
