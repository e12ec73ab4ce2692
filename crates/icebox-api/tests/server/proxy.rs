//! The way to ports of sandboxes.

use std::net::Ipv4Addr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::script::{ID, KEY, Script};
use crate::served::{
    DOUBT, PATIENCE, SILENT_STREAM, Served, guest_port, guest_port_at, read_until, rest, send,
    status,
};

#[tokio::test]
async fn the_proxy_carries_requests_to_a_port_by_header_and_by_host() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (port, mut heads) = guest_port("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi").await;
    for routing in [
        format!("host: localhost\ne2b-sandbox-id: {ID}\ne2b-sandbox-port: {port}"),
        format!("host: localhost\ne2b-sandbox-id: {ID}-6532622b\ne2b-sandbox-port: {port}"),
        format!("host: {port}-{ID}.example.org:8443"),
    ] {
        let answer = served
            .ask(&format!(
                "GET /a%2Fb?c=d HTTP/1.1\n{routing}\nx-api-key: {KEY}"
            ))
            .await;
        assert_eq!(status(&answer), "200", "{routing}\n{answer}");
        assert!(answer.ends_with("hi"), "{answer}");
        let head = heads.recv().await.expect("the guest was asked");
        assert!(head.starts_with("GET /a%2Fb?c=d HTTP/1.1\r\n"), "{head}");
        assert!(!head.contains(KEY), "the key is not the guest's business");
        assert!(
            !head.contains("the-token"),
            "from outside no token is added"
        );
    }
}

#[tokio::test]
async fn the_agents_token_is_added_for_who_has_the_socket_and_for_nobody_else() {
    let [.., high, low] = std::process::id().to_be_bytes();
    let address = Ipv4Addr::new(127, 99, high, low);
    let script = Script::at(address);
    let served = Served::new(&script).await;
    let (_, mut heads) = guest_port_at(
        &format!("{address}:49983"),
        "HTTP/1.1 204 No Content\r\n\r\n",
    )
    .await;
    let request =
        format!("GET /metrics HTTP/1.1\nhost: h\ne2b-sandbox-id: {ID}\ne2b-sandbox-port: 49983");
    served.ask_admin(&request).await;
    let head = heads.recv().await.expect("the agent was asked");
    assert!(head.contains("x-access-token: the-token\r\n"), "{head}");
    served.ask(&request).await;
    let head = heads.recv().await.expect("the agent was asked");
    assert!(!head.contains("the-token"), "{head}");
    served
        .ask(&format!("{request}\nx-access-token: mine"))
        .await;
    let head = heads.recv().await.expect("the agent was asked");
    assert!(head.contains("x-access-token: mine\r\n"), "{head}");
}

#[tokio::test]
async fn inv_42_only_a_full_id_opens_ports_from_outside() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (port, _heads) = guest_port("HTTP/1.1 204 No Content\r\n\r\n").await;
    for name in ["web", "iaaaa", "inothing"] {
        let answer = served
            .ask(&format!(
                "GET / HTTP/1.1\nhost: h\ne2b-sandbox-id: {name}\ne2b-sandbox-port: {port}"
            ))
            .await;
        assert_eq!(status(&answer), "502");
        let expected =
            format!(r#"{{"sandboxId":"{name}","message":"The sandbox was not found","code":502}}"#);
        assert!(answer.ends_with(&expected), "{answer}");
    }
    let answer = served
        .ask_admin(&format!(
            "GET / HTTP/1.1\nhost: h\ne2b-sandbox-id: web\ne2b-sandbox-port: {port}"
        ))
        .await;
    assert_eq!(status(&answer), "204", "who has the socket may use names");
}

#[tokio::test]
async fn a_closed_port_is_told_in_e2bs_words() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let unused = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let port = unused.local_addr().expect("an address").port();
    drop(unused);
    let answer = served
        .ask(&format!("GET / HTTP/1.1\nhost: {port}-{ID}.example.org"))
        .await;
    assert_eq!(status(&answer), "502");
    let expected = format!(
        r#"{{"sandboxId":"{ID}","message":"The sandbox is running but port is not open","port":{port},"code":502}}"#
    );
    assert!(answer.ends_with(&expected), "{answer}");
}

#[tokio::test]
async fn inv_42_host_only_paths_of_the_agent_are_not_there() {
    let script = Script::new();
    let served = Served::new(&script).await;
    for path in ["/init", "/prepare", "/%69nit", "//init/"] {
        let request = format!("POST {path} HTTP/1.1\nhost: 49983-{ID}.example.org");
        assert_eq!(status(&served.ask(&request).await), "404", "{path}");
        assert_eq!(status(&served.ask_admin(&request).await), "404", "{path}");
    }
}

#[tokio::test]
async fn a_stream_is_cut_without_an_end_when_its_sandbox_goes() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (port, _heads) =
        guest_port("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n").await;
    let mut stream = TcpStream::connect(served.public).await.expect("connect");
    let head = format!("GET / HTTP/1.1\r\nhost: {port}-{ID}.example.org\r\n\r\n");
    stream.write_all(head.as_bytes()).await.expect("write");
    let mut answer = Vec::new();
    while !answer.ends_with(b"hello\r\n") {
        answer.push(stream.read_u8().await.expect("the stream lives"));
    }
    script.running.send_replace(false);
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.ok();
    assert_eq!(
        rest, b"",
        "no last chunk: the client must see a broken stream"
    );
}

#[tokio::test]
async fn an_upgraded_connection_is_carried_both_ways_and_cut() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (port, mut heads) = guest_port(
        "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n",
    )
    .await;
    let mut stream = TcpStream::connect(served.public).await.expect("connect");
    let head = format!(
        "GET / HTTP/1.1\r\nhost: {port}-{ID}.example.org\r\nconnection: Upgrade\r\nupgrade: echo\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.expect("write");
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await.expect("an answer"));
    }
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert_eq!(status(&answer), "101", "{answer}");
    assert!(answer.contains("upgrade: echo"), "{answer}");
    let head = heads.recv().await.expect("the guest was asked");
    assert!(head.contains("upgrade: echo"), "{head}");
    stream.write_all(b"ping").await.expect("write");
    let mut echoed = [0; 4];
    stream.read_exact(&mut echoed).await.expect("the echo");
    assert_eq!(&echoed, b"ping");
    script.running.send_replace(false);
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.ok();
    assert_eq!(rest, b"");
}

#[tokio::test]
async fn a_silent_stream_holds_its_pass_until_its_client_goes() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (port, _heads) = guest_port(SILENT_STREAM).await;
    let mut stream = served.connect().await;
    send(
        &mut stream,
        &format!("GET / HTTP/1.1\nhost: {port}-{ID}.example.org"),
    )
    .await;
    read_until(&mut stream, "hello\r\n").await;
    script.holds(1).await;
    // Beside it, an exchange that ends gives its pass back although its connection stays.
    let (quick, _heads) = guest_port("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi").await;
    let mut other = served.connect().await;
    for _ in 0..2 {
        send(
            &mut other,
            &format!("GET / HTTP/1.1\nhost: {quick}-{ID}.example.org"),
        )
        .await;
        read_until(&mut other, "hi").await;
        script.holds(1).await;
    }
    drop(stream);
    script.holds(0).await;
}

#[tokio::test]
async fn an_upload_holds_its_pass_when_the_answer_has_come_already() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let guest = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let port = guest.local_addr().expect("an address").port();
    let reading = tokio::spawn(async move {
        let (mut stream, _) = guest.accept().await.expect("a connection");
        read_until(&mut stream, "\r\n\r\n").await;
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi";
        stream.write_all(answer).await.expect("answer");
        read_until(&mut stream, "the end").await;
    });
    let mut stream = served.connect().await;
    send(
        &mut stream,
        &format!("POST / HTTP/1.1\nhost: {port}-{ID}.example.org\ncontent-length: 14"),
    )
    .await;
    read_until(&mut stream, "hi").await;
    script.holds(1).await;
    stream.write_all(b"not yet").await.expect("write");
    script.holds(1).await;
    stream.write_all(b"the end").await.expect("write");
    reading.await.expect("the guest got everything");
    script.holds(0).await;
}

#[tokio::test]
async fn an_upgraded_connection_holds_its_pass_until_both_sides_have_gone() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (port, _heads) = guest_port(
        "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n",
    )
    .await;
    let request = format!(
        "GET / HTTP/1.1\nhost: {port}-{ID}.example.org\nconnection: upgrade\nupgrade: echo"
    );
    let mut stream = served.connect().await;
    send(&mut stream, &request).await;
    read_until(&mut stream, "\r\n\r\n").await;
    script.holds(1).await;
    stream.write_all(b"ping").await.expect("write");
    read_until(&mut stream, "ping").await;
    script.holds(1).await;
    // Half of it: the guest still has something to say.
    stream.write_all(b"last").await.expect("write");
    stream.shutdown().await.expect("end the half");
    assert_eq!(rest(&mut stream).await, b"last");
    script.holds(0).await;

    let mut stream = served.connect().await;
    send(&mut stream, &request).await;
    read_until(&mut stream, "\r\n\r\n").await;
    drop(stream);
    script.holds(0).await;
}

#[tokio::test]
async fn inv_07_a_client_that_takes_nothing_does_not_keep_a_connection_that_is_cut() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let guest = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let port = guest.local_addr().expect("an address").port();
    let (full, mut is_full) = tokio::sync::mpsc::unbounded_channel();
    let writing = tokio::spawn(async move {
        let (mut stream, _) = guest.accept().await.expect("a connection");
        read_until(&mut stream, "\r\n\r\n").await;
        let head = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n";
        stream.write_all(head).await.expect("write");
        let piece = vec![b'x'; 1 << 16];
        loop {
            match tokio::time::timeout(DOUBT, stream.write_all(&piece)).await {
                Ok(Ok(())) => {}
                Ok(Err(_cut)) => return,
                Err(_no_room) => full.send(()).expect("the test waits"),
            }
        }
    });
    let mut stream = served.connect().await;
    send(
        &mut stream,
        &format!("GET / HTTP/1.1\nhost: {port}-{ID}.example.org"),
    )
    .await;
    is_full.recv().await.expect("nobody reads");
    script.holds(1).await;
    script.running.send_replace(false);
    script.holds(0).await;
    let cut = tokio::time::timeout(PATIENCE, writing).await;
    cut.expect("in time").expect("no panic");
}

#[tokio::test]
async fn inv_07_what_lasts_as_long_as_somebody_wants_it_to_is_said_to_be_a_stream() {
    const DONE: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
    let script = Script::new();
    let served = Served::new(&script).await;
    let mut streams = 0;
    for (sent, answer, is_stream) in [
        ("x: y", DONE, false),
        ("content-type: application/json", DONE, false),
        ("content-type: application/connect", DONE, false),
        ("content-type: application/connect+json", DONE, true),
        ("content-type: Application/Connect+proto", DONE, true),
        (
            "accept: text/event-stream",
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n\r\n",
            true,
        ),
        (
            "connection: upgrade\nupgrade: echo",
            "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n",
            true,
        ),
        ("connection: upgrade\nupgrade: echo", DONE, false),
    ] {
        let (port, _heads) = guest_port(answer).await;
        let mut stream = served.connect().await;
        let request = format!("POST / HTTP/1.1\nhost: {port}-{ID}.example.org\ncontent-length: 0");
        send(&mut stream, &format!("{request}\n{sent}")).await;
        read_until(&mut stream, "\r\n\r\n").await;
        streams += u32::from(is_stream);
        assert_eq!(*script.streams.borrow(), streams, "{sent}: {answer}");
        drop(stream);
        script.holds(0).await;
    }
}

#[tokio::test]
async fn inv_35_whether_it_runs_is_a_question_that_wakes_nobody() {
    let script = Script::new();
    let served = Served::new(&script).await;
    for (port, path, wakes) in [
        (49983, "/health", 0),
        (49983, "/health?x", 0),
        (49983, "/metrics", 1),
        (8000, "/health", 2),
    ] {
        let request =
            format!("GET {path} HTTP/1.1\nhost: h\ne2b-sandbox-id: {ID}\ne2b-sandbox-port: {port}");
        served.ask(&request).await;
        assert_eq!(*script.woken.borrow(), wakes, "{port} {path}");
    }
}

#[tokio::test]
async fn connect_leads_nowhere() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (port, _heads) = guest_port("HTTP/1.1 200 OK\r\n\r\n").await;
    let answer = served
        .ask(&format!(
            "CONNECT {port}-{ID}.example.org:80 HTTP/1.1\nhost: {port}-{ID}.example.org"
        ))
        .await;
    assert_eq!(status(&answer), "405", "{answer}");
    script.holds(0).await;
}

#[tokio::test]
async fn a_body_that_says_its_length_twice_is_carried_whole() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (port, mut heads) = guest_port("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi").await;
    let host = format!("host: {port}-{ID}.example.org");
    for lengths in [
        "content-length: 2\ntransfer-encoding: chunked",
        "transfer-encoding: chunked\ncontent-length: 2",
    ] {
        let mut stream = served.connect().await;
        send(&mut stream, &format!("POST / HTTP/1.1\n{host}\n{lengths}")).await;
        stream
            .write_all(b"5\r\nhello\r\n0\r\n\r\n")
            .await
            .expect("write");
        let answer = read_until(&mut stream, "\r\n\r\n").await;
        // Whoever refuses it is right, too.
        if status(&answer) == "200" {
            let head = heads.recv().await.expect("the guest was asked");
            assert!(!head.contains("content-length"), "{head}");
        } else {
            assert_eq!(status(&answer), "400", "{answer}");
        }
    }
}
