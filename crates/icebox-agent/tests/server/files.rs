//! The bytes of files: INV-40.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink},
    path::Path,
};

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt as _, Full};
use hyper::http::{self, HeaderMap, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use icebox_agent_api::{
    TOKEN_HEADER,
    client::{AgentError, FileReader, Upload},
};
use icebox_host::skip::skip;
use rustix::mount::{MountFlags, UnmountFlags};
use sha2::{Digest as _, Sha256};

use crate::support::{BOOT_TOKEN, Server};

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Answer {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

/// A request as any HTTP client makes it.
async fn send(server: &Server, request: http::request::Builder, body: impl Into<Bytes>) -> Answer {
    let stream = tokio::net::TcpStream::connect(server.address)
        .await
        .unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    let request = request
        .header(header::HOST, "localhost")
        .body(Full::new(body.into()))
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    let (parts, body) = response.into_parts();
    Answer {
        status: parts.status,
        headers: parts.headers,
        body: body.collect().await.unwrap().to_bytes(),
    }
}

fn get(path_and_query: &str) -> http::request::Builder {
    Request::get(path_and_query).header(TOKEN_HEADER, BOOT_TOKEN)
}

fn post(path_and_query: &str) -> http::request::Builder {
    Request::post(path_and_query).header(TOKEN_HEADER, BOOT_TOKEN)
}

fn upload_to(path: &Path) -> Upload {
    Upload {
        path: path.to_str().unwrap().into(),
        metadata: BTreeMap::new(),
    }
}

fn pieces(
    count: usize,
    piece: &Bytes,
) -> impl futures_util::Stream<Item = std::io::Result<Bytes>> + Send + 'static {
    stream::iter(std::iter::repeat_n(piece.clone(), count).map(Ok))
}

async fn read_all(mut reader: FileReader) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(chunk) = reader.chunk().await.unwrap() {
        all.extend_from_slice(&chunk);
    }
    all
}

#[tokio::test]
async fn inv_40_a_gibibyte_up_and_down_takes_no_memory() {
    const PIECES: usize = 1024;
    let server = Server::start();
    let client = server.client();
    let before = server.peak_rss_kib();
    let path = server.directory.path().join("big");
    let piece = Bytes::from(vec![0x5a; 1 << 20]);
    client
        .write_file(&upload_to(&path), pieces(PIECES, &piece))
        .await
        .unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 30);
    let mut reader = client.read_file(path.to_str().unwrap()).await.unwrap();
    let mut received = 0;
    while let Some(chunk) = reader.chunk().await.unwrap() {
        assert!(chunk.iter().all(|byte| *byte == 0x5a));
        received += chunk.len();
    }
    assert_eq!(received, 1 << 30);
    let grown = server.peak_rss_kib() - before;
    assert!(grown < 16 << 10, "the server grew by {grown} KiB");
}

#[tokio::test]
async fn inv_40_what_is_not_a_regular_file_is_refused_unopened() {
    let server = Server::start();
    let client = server.client();
    let directory = server.directory.path();
    let fifo = directory.join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o644),
        0,
    )
    .unwrap();
    let socket = directory.join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let link = directory.join("link");
    symlink("/dev/zero", &link).unwrap();
    for path in [&fifo, &socket, &link, Path::new("/dev/zero"), directory] {
        let read = client
            .read_file(path.to_str().unwrap())
            .await
            .err()
            .unwrap();
        assert_eq!(read.status(), Some(400), "{path:?}: {read}");
        let written = client
            .write_file(&upload_to(path), pieces(1, &Bytes::from_static(b"x")))
            .await
            .unwrap_err();
        assert_eq!(written.status(), Some(400), "{path:?}: {written}");
    }
}

#[tokio::test]
async fn inv_40_a_missing_file_is_a_typed_error() {
    let server = Server::start();
    let answer = send(&server, get("/files?path=/no/such/file"), "").await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
    assert_eq!(
        answer.text(),
        r#"{"code":404,"message":"path '/no/such/file' does not exist"}"#
    );
}

#[tokio::test]
async fn inv_40_a_full_disk_is_a_typed_error() {
    let server = Server::start();
    let small = server.directory.path().join("small");
    fs::create_dir(&small).unwrap();
    rustix::mount::mount("tmpfs", &small, "tmpfs", MountFlags::empty(), c"size=1m").unwrap();
    let piece = Bytes::from(vec![1; 1 << 20]);
    let result = server
        .client()
        .write_file(&upload_to(&small.join("f")), pieces(64, &piece))
        .await;
    rustix::mount::unmount(&small, UnmountFlags::DETACH).unwrap();
    assert_eq!(result.unwrap_err().status(), Some(507));
}

#[tokio::test]
async fn sizes_that_the_kernel_claims_are_not_believed() {
    let server = Server::start();
    let reader = server
        .client()
        .read_file("/proc/sys/kernel/random/boot_id")
        .await
        .unwrap();
    let boot_id = fs::read("/proc/sys/kernel/random/boot_id").unwrap();
    assert_eq!(read_all(reader).await, boot_id);
}

#[tokio::test]
async fn an_upload_creates_directories_and_keeps_the_inode() {
    let server = Server::start();
    let client = server.client().with_user("daemon");
    let path = server.directory.path().join("a/b/c d+é");
    let file = client
        .write_file(&upload_to(&path), pieces(3, &Bytes::from_static(b"abc")))
        .await
        .unwrap();
    assert_eq!(
        (file.path.as_str(), file.name.as_str(), file.kind.as_str()),
        (path.to_str().unwrap(), "c d+é", "file")
    );
    assert_eq!(fs::read(&path).unwrap(), b"abcabcabc");
    let first = fs::metadata(&path).unwrap();
    assert_eq!(
        (first.uid(), first.gid(), first.mode() & 0o777),
        (1, 1, 0o644)
    );
    for made in [
        path.parent().unwrap(),
        path.parent().unwrap().parent().unwrap(),
    ] {
        assert_eq!(fs::metadata(made).unwrap().uid(), 1);
    }
    client
        .write_file(&upload_to(&path), pieces(1, &Bytes::from_static(b"x")))
        .await
        .unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"x");
    assert_eq!(fs::metadata(&path).unwrap().ino(), first.ino());
}

#[tokio::test]
async fn inv_40_a_link_leads_an_upload_no_further_than_its_users_rights() {
    let server = Server::start();
    let directory = server.directory.path();
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();
    let (theirs, roots) = (directory.join("theirs"), directory.join("roots"));
    fs::create_dir(&theirs).unwrap();
    chown(&theirs, Some(1), Some(1)).unwrap();
    fs::create_dir(&roots).unwrap();
    let precious = roots.join("precious");
    fs::write(&precious, "precious").unwrap();
    symlink(&precious, theirs.join("file")).unwrap();
    symlink(&roots, theirs.join("directory")).unwrap();
    symlink(roots.join("new"), theirs.join("dangling")).unwrap();
    fs::hard_link(&precious, theirs.join("second-name")).unwrap();
    for path in [
        "file",
        "second-name",
        "dangling",
        "directory/precious",
        "directory/new",
        "directory/a/b",
    ] {
        let request = post(&format!(
            "/files?username=daemon&path={}",
            theirs.join(path).display()
        ));
        let refused = send(&server, request, "x").await;
        assert_eq!(refused.status, StatusCode::FORBIDDEN, "{path}");
    }
    assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
    assert_eq!(fs::metadata(&precious).unwrap().uid(), 0);
    assert_eq!(fs::read_dir(&roots).unwrap().count(), 1);

    // Links to what is theirs, and what anybody may write, lead there; and root's rights lead wherever root is asked for.
    let shared = roots.join("shared");
    fs::write(&shared, "").unwrap();
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o666)).unwrap();
    symlink(&shared, theirs.join("to-shared")).unwrap();
    symlink(&theirs, theirs.join("self")).unwrap();
    for (user, path, lands, owner) in [
        ("daemon", "self/own/deep", theirs.join("own/deep"), 1),
        ("daemon", "to-shared", shared.clone(), 0),
        ("root", "file", precious.clone(), 0),
    ] {
        let request = post(&format!(
            "/files?username={user}&path={}",
            theirs.join(path).display()
        ));
        let answer = send(&server, request, path).await;
        assert_eq!(answer.status, StatusCode::OK, "{path}: {}", answer.text());
        assert_eq!(fs::read_to_string(&lands).unwrap(), path);
        assert_eq!(fs::metadata(&lands).unwrap().uid(), owner, "{path}");
    }
}

#[tokio::test]
async fn metadata_is_replaced_by_each_upload() {
    let server = Server::start();
    let client = server.client();
    let path = server.directory.path().join("f");
    let mut upload = upload_to(&path);
    upload.metadata = BTreeMap::from([("a".into(), "1".into()), ("b".into(), "2".into())]);
    let result = client.write_file(&upload, pieces(1, &Bytes::new())).await;
    if let Err(AgentError::Refused {
        status: 400,
        message,
        ..
    }) = &result
    {
        assert!(message.contains("keeps no metadata"), "{message}");
        let why = format!("{} has no user attributes", path.display());
        skip("metadata_is_replaced_by_each_upload", &why);
        return;
    }
    assert_eq!(result.unwrap().metadata, upload.metadata);
    upload.metadata = BTreeMap::from([("b".into(), "3".into())]);
    client
        .write_file(&upload, pieces(1, &Bytes::new()))
        .await
        .unwrap();
    let request = icebox_agent_api::proto::filesystem::StatRequest {
        path: upload.path.clone(),
        ..Default::default()
    };
    let entry = client
        .filesystem()
        .stat(request)
        .await
        .unwrap()
        .into_owned()
        .entry;
    let metadata: BTreeMap<String, String> = entry.metadata.clone().into_iter().collect();
    assert_eq!(metadata, upload.metadata);
}

#[tokio::test]
async fn a_content_that_fails_is_no_success() {
    let server = Server::start();
    let path = server.directory.path().join("f");
    let content = stream::iter([
        Ok(Bytes::from_static(b"abc")),
        Err(std::io::Error::other("lost")),
    ]);
    server
        .client()
        .write_file(&upload_to(&path), content)
        .await
        .unwrap_err();
}

#[tokio::test]
async fn multipart_uploads_write_several_files() {
    let server = Server::start();
    let directory = server.directory.path().to_str().unwrap();
    let part = |name: &str, content: &str| {
        format!(
            "--B\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n{content}\r\n"
        )
    };
    let multipart = || {
        post("/files?username=root").header(header::CONTENT_TYPE, "multipart/form-data; boundary=B")
    };
    let (one, two) = (format!("{directory}/one"), format!("{directory}/sub/two"));
    let body = format!("{}{}--B--\r\n", part(&one, "first"), part(&two, ""));
    let answer = send(&server, multipart(), body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert_eq!(
        answer.text(),
        format!(
            r#"[{{"path":"{one}","name":"one","type":"file"}},{{"path":"{two}","name":"two","type":"file"}}]"#
        )
    );
    assert_eq!(fs::read(&one).unwrap(), b"first");
    assert_eq!(fs::read(&two).unwrap(), b"");

    let twice = send(
        &server,
        multipart(),
        format!("{}{}--B--\r\n", part(&one, "1"), part(&one, "2")),
    )
    .await;
    assert_eq!(twice.status, StatusCode::BAD_REQUEST, "{}", twice.text());
    let broken = send(&server, multipart(), "--B\r\nnonsense").await;
    assert_eq!(broken.status, StatusCode::BAD_REQUEST, "{}", broken.text());
}

#[tokio::test]
async fn gzip_bodies_are_unpacked() {
    let server = Server::start();
    let path = server.directory.path().join("f");
    let uri = format!("/files?path={}", path.display());
    let compressed = || post(&uri).header(header::CONTENT_ENCODING, "gzip");
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&[7; 100_000]).unwrap();
    let body = encoder.finish().unwrap();
    assert_eq!(
        send(&server, compressed(), body.clone()).await.status,
        StatusCode::OK
    );
    assert_eq!(fs::read(&path).unwrap(), [7; 100_000]);
    for invalid in [&b"this is no gzip at all"[..], &body[..body.len() / 2]] {
        let answer = send(&server, compressed(), Bytes::copy_from_slice(invalid)).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{}", answer.text());
    }
    let other = send(
        &server,
        post(&uri).header(header::CONTENT_ENCODING, "br"),
        "x",
    )
    .await;
    assert_eq!(other.status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
}

#[tokio::test]
async fn a_range_is_a_part() {
    let server = Server::start();
    let path = server.directory.path().join("f");
    fs::write(&path, b"0123456789").unwrap();
    let uri = format!("/files?path={}", path.display());
    let part = send(&server, get(&uri).header(header::RANGE, "bytes=2-4"), "").await;
    assert_eq!(
        (part.status, part.text()),
        (StatusCode::PARTIAL_CONTENT, "234")
    );
    assert_eq!(part.headers[header::CONTENT_RANGE], "bytes 2-4/10");
    let beyond = send(&server, get(&uri).header(header::RANGE, "bytes=10-"), "").await;
    assert_eq!(beyond.status, StatusCode::RANGE_NOT_SATISFIABLE);
    assert_eq!(send(&server, get(&uri), "").await.text(), "0123456789");
}

#[tokio::test]
async fn inv_42_files_take_the_token_or_a_signature() {
    let server = Server::start();
    let path = server.directory.path().join("f");
    fs::write(&path, "secret").unwrap();
    let path = path.to_str().unwrap();
    let message = async |uri: &str| {
        let answer = send(&server, Request::get(uri), "").await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
        answer.text().to_owned()
    };
    let missing = r#"{"code":401,"message":"missing signature query parameter"}"#;
    assert_eq!(message(&format!("/files?path={path}")).await, missing);
    let invalid = r#"{"code":401,"message":"invalid signature"}"#;
    assert_eq!(
        message(&format!("/files?path={path}&signature=v1_x")).await,
        invalid
    );

    let sign = |text: String| {
        STANDARD_NO_PAD
            .encode(Sha256::digest(text))
            .replace('+', "%2B")
    };
    let signature = sign(format!("{path}:read:root:{BOOT_TOKEN}"));
    let signed = format!("/files?path={path}&username=root&signature=v1_{signature}");
    assert_eq!(
        send(&server, Request::get(&signed), "").await.text(),
        "secret"
    );
    assert_eq!(
        send(&server, Request::post(&signed), "x").await.status,
        StatusCode::UNAUTHORIZED
    );
    let signature = sign(format!("{path}:read::{BOOT_TOKEN}:1000"));
    let old = format!("/files?path={path}&signature=v1_{signature}&signature_expiration=1000");
    assert_eq!(
        message(&old).await,
        r#"{"code":401,"message":"signature is already expired"}"#
    );
}

#[tokio::test]
async fn users_and_paths_that_are_none_are_refused() {
    let server = Server::start();
    let unknown = send(
        &server,
        get("/files?path=/etc/hostname&username=nobody-at-all"),
        "",
    )
    .await;
    assert_eq!(unknown.status, StatusCode::UNAUTHORIZED);
    assert!(
        unknown.text().contains("invalid username: 'nobody-at-all'"),
        "{}",
        unknown.text()
    );
    assert_eq!(
        send(&server, get("/files?path=/etc/%00"), "").await.status,
        StatusCode::BAD_REQUEST
    );
    let long = "a".repeat(300);
    assert_eq!(
        send(&server, get(&format!("/files?path=/{long}")), "")
            .await
            .status,
        StatusCode::BAD_REQUEST
    );
    assert_eq!(
        send(&server, post("/files"), "x").await.status,
        StatusCode::BAD_REQUEST
    );
}

#[tokio::test]
async fn browsers_of_any_origin_may_ask() {
    let server = Server::start();
    let preflight = send(&server, Request::options("/process.Process/Start"), "").await;
    assert_eq!(preflight.status, StatusCode::NO_CONTENT);
    assert_eq!(preflight.headers[header::ACCESS_CONTROL_ALLOW_ORIGIN], "*");
    let refused = send(&server, Request::get("/metrics"), "").await;
    assert_eq!(refused.headers[header::ACCESS_CONTROL_ALLOW_ORIGIN], "*");
}
