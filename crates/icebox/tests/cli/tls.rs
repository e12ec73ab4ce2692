//! HTTPS with a certificate of the operator's own.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::support::{Daemon, finish, serve};

/// Writes a new certificate for `*.icebox.test` and its key to `directory`, and returns the certificate.
fn certify(directory: &Path) -> CertificateDer<'static> {
    let names = vec!["*.icebox.test".to_owned(), "icebox.test".to_owned()];
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    std::fs::write(directory.join("tls.pem"), made.cert.pem()).unwrap();
    std::fs::write(directory.join("tls.key"), made.signing_key.serialize_pem()).unwrap();
    made.cert.der().clone()
}

/// Asks with HTTPS, trusting this certificate alone.
fn ask(
    address: &str,
    trusted: &CertificateDer<'static>,
    name: &str,
    request: &str,
) -> std::io::Result<String> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = name.to_owned().try_into().unwrap();
    let connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut stream = StreamOwned::new(connection, TcpStream::connect(address)?);
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[test]
fn https_with_the_operators_certificate_and_the_one_that_replaces_it() {
    let files = tempfile::tempdir().unwrap();
    let first = certify(files.path());
    let (chain, key) = (files.path().join("tls.pem"), files.path().join("tls.key"));
    let (chain, key) = (chain.to_str().unwrap(), key.to_str().unwrap());
    let daemon = Daemon::start_with(&["--tls-cert", chain, "--tls-key", key]);
    let address = daemon.address();
    let get = "GET /sandboxes HTTP/1.1\r\nhost: icebox.test\r\nconnection: close\r\n";
    let with_key = format!("{get}x-api-key: {}\r\n\r\n", daemon.api_key());
    let answer = ask(&address, &first, "icebox.test", &with_key).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let answer = ask(&address, &first, "icebox.test", &format!("{get}\r\n")).unwrap();
    assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
    // Ports of sandboxes have names of their own, which one certificate can be for.
    let port = "80-inothing.icebox.test";
    let request = format!("GET / HTTP/1.1\r\nhost: {port}\r\nconnection: close\r\n\r\n");
    let answer = ask(&address, &first, port, &request).unwrap();
    assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");

    // Whoever does not speak TLS, or never goes on with it, keeps nobody else waiting.
    let silent = TcpStream::connect(&address).unwrap();
    let mut plain = TcpStream::connect(&address).unwrap();
    plain.write_all(with_key.as_bytes()).unwrap();
    let mut said = Vec::new();
    plain.read_to_end(&mut said).ok();
    assert!(!said.starts_with(b"HTTP"), "no answer in the clear");
    let second = certify(files.path());
    let refused = ask(&address, &first, "icebox.test", &with_key);
    assert!(refused.is_err(), "it is another one now: {refused:?}");
    let answer = ask(&address, &second, "icebox.test", &with_key).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    // Half a renewal, and a spoilt one: what there was is served.
    std::fs::write(files.path().join("tls.pem"), "spoilt").unwrap();
    let answer = ask(&address, &second, "icebox.test", &with_key).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    drop(silent);
}

#[test]
fn a_certificate_that_cannot_be_served_is_refused_at_the_start() {
    let directory = tempfile::tempdir().unwrap();
    certify(directory.path());
    let file = |name| directory.path().join(name);
    std::fs::write(file("empty.pem"), "").unwrap();
    let cases: [(&str, Option<&str>, &str); 4] = [
        ("tls.pem", None, "without its key"),
        ("missing.pem", Some("tls.key"), "cannot read"),
        ("empty.pem", Some("tls.key"), "has no certificate"),
        ("tls.pem", Some("tls.pem"), "cannot read"),
    ];
    for (chain, key, expected) in cases {
        let mut daemon = serve(directory.path());
        daemon.args(["--sim", "--listen", "127.0.0.1:0"]);
        daemon.arg("--tls-cert").arg(file(chain));
        if let Some(key) = key {
            daemon.arg("--tls-key").arg(file(key));
        }
        let (status, _, stderr) = finish(daemon.spawn().unwrap());
        assert_eq!(status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(expected), "{stderr}");
        assert!(stderr.contains("hint:"), "{stderr}");
    }
}
