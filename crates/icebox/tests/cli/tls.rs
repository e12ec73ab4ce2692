//! HTTPS, with a certificate of the operator's or one of this host's own authority, and HTTP/2 over it.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::support::{Daemon, finish, python, serve, succeed};

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

/// What E2B's SDK does by HTTPS, in a guest that an agent beside the daemon stands in for. It speaks HTTP/2 then, and says so.
const PROGRAM: &str = r#"
import logging, sys, threading

log = []

class Kept(logging.Handler):
    def emit(self, record):
        log.append(record.getMessage())

logging.getLogger("pyqwest").addHandler(Kept())
logging.getLogger("pyqwest").setLevel(logging.DEBUG)
logging.getLogger("pyqwest.access").setLevel(logging.DEBUG)

from e2b import Sandbox, TimeoutException

box = Sandbox.connect(sys.argv[1], timeout=600)
assert box.is_running()
assert box.commands.run("echo out; exit 0").stdout == "out\n"
raw = bytes(range(256)) * 32768
box.files.write(sys.argv[2], raw)
assert bytes(box.files.read(sys.argv[2], format="bytes")) == raw
# One connection carries many at once, and each comes as it is said.
handles = [box.commands.run("read line; echo $line", background=True, stdin=True) for _ in range(20)]
for n, handle in enumerate(handles):
    box.commands.send_stdin(handle.pid, f"{n}\n")
for n, handle in reversed(list(enumerate(handles))):
    assert handle.wait().stdout == f"{n}\n"
assert any("HTTP/2" in it or "h2" in it.lower() for it in log), log[:5]
# A kill cuts what is on the way, and is told from a command that has ended.
sleeping, ended = box.commands.run("sleep 600", background=True, timeout=0), []

def wait():
    try:
        ended.append(sleeping.wait())
    except Exception as error:
        ended.append(error)

waiting = threading.Thread(target=wait)
waiting.start()
assert box.kill() is True
waiting.join(60)
assert ended and isinstance(ended[0], TimeoutException) and "sandbox" in str(ended[0]), ended
assert not box.is_running()
"#;

#[test]
fn e2bs_sdk_speaks_http2_to_a_daemon_with_an_authority_of_its_own() {
    let mut daemon = Daemon::start_with(&["--tls-local"]).with_template();
    daemon.get(&["create", "base", "--name", "web"]);
    let pem = daemon.path("ca.pem");
    let data = daemon.path("data");
    let shown = daemon.get(&["ca", "--data-dir", data.to_str().unwrap()]);
    std::fs::write(&pem, format!("{shown}\n")).unwrap();
    let path = daemon.get(&["ca", "--path", "--data-dir", data.to_str().unwrap()]);
    assert_eq!(std::fs::read_to_string(path).unwrap().trim_end(), shown);

    let authority = CertificateDer::from_pem_slice(shown.as_bytes()).unwrap();
    let address = daemon.address();
    let get = format!(
        "GET /sandboxes/web HTTP/1.1\r\nhost: h\r\nconnection: close\r\nx-api-key: {}\r\n\r\n",
        daemon.api_key()
    );
    for name in [
        "icebox.localhost",
        "8000-i1.icebox.localhost",
        "localhost",
        "127.0.0.1",
    ] {
        let answer = ask(&address, &authority, name, &get).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{name}: {answer}");
    }
    assert!(ask(&address, &authority, "example.org", &get).is_err());
    let answer = ask(&address, &authority, "localhost", &get).unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    let web: serde_json::Value = serde_json::from_str(body).unwrap();
    let text = |key: &str| web[key].as_str().unwrap();
    daemon.add_agent("web", Some(text("envdAccessToken")));

    let mut program = Command::new(python("e2b==2.63.0").join("bin/python"));
    let url = format!("https://{address}");
    program
        .args(["-B", "-c", PROGRAM, text("sandboxID")])
        .arg(daemon.path("carried"))
        .env("E2B_API_KEY", daemon.api_key())
        .env("E2B_API_URL", &url)
        .env("E2B_SANDBOX_URL", &url)
        .env("SSL_CERT_FILE", pem);
    succeed(&mut program);
}
