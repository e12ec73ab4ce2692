//! What the real program cannot be made to do: APIs that are silent, slow, garbled or gone, and saves that are not what
//! they should be.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use icebox_engine::host::{ErrorKind, Machine as _, SavePlan, SavedPages, VcpuState};
use icebox_engine::id::SandboxId;
use icebox_engine::layout::MEMORY_BASE;
use serde_json::json;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

use super::api::{Api, ApiError};
use super::machine::ChMachine;
use crate::launcher::Process;
use crate::vmm::console::Outputs;

const SOON: Duration = Duration::from_millis(300);

/// What the stand-in does when it is asked for something.
enum Reply {
    /// An HTTP answer with this status and body.
    Answer(u16, String),
    /// These bytes, and then nothing: the connection closes.
    Bytes(Vec<u8>),
    /// One byte of an answer now and then, for ever.
    Drip,
    /// Nothing, ever.
    Silence,
}

/// A stand-in for the API, and what it was asked for.
struct Fake {
    directory: TempDir,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Fake {
    fn new(script: impl Fn(&str, usize) -> Reply + Send + Sync + 'static) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("api.sock")).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (script, list) = (Arc::new(script), Arc::clone(&asked));
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (script, list) = (Arc::clone(&script), Arc::clone(&list));
                tokio::spawn(async move {
                    let mut stream = stream;
                    let request = read_request(&mut stream).await;
                    let times = {
                        let mut list: std::sync::MutexGuard<'_, Vec<String>> = list.lock().unwrap();
                        let times = list.iter().filter(|it| **it == request).count();
                        list.push(request.clone());
                        times
                    };
                    reply(&mut stream, script(&request, times)).await;
                });
            }
        });
        Self { directory, asked }
    }

    fn api(&self) -> Api {
        Api::new(self.directory.path().join("api.sock"))
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

/// Reads a request and its body; returns what it is for.
async fn read_request(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    let head = loop {
        if let Some(end) = bytes.windows(4).position(|it| it == b"\r\n\r\n") {
            break String::from_utf8(bytes[..end].to_vec()).unwrap();
        }
        assert!(stream.read_buf(&mut bytes).await.unwrap() > 0, "no request");
    };
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.parse::<usize>().unwrap())
    });
    while bytes.len() < head.len() + 4 + length.unwrap_or_default() {
        assert!(stream.read_buf(&mut bytes).await.unwrap() > 0, "no body");
    }
    let path = head.split(' ').nth(1).unwrap();
    path.strip_prefix("/api/v1/").unwrap().to_owned()
}

async fn reply(stream: &mut UnixStream, reply: Reply) {
    let sent = match reply {
        Reply::Answer(status, body) => {
            let head = format!(
                "HTTP/1.1 {status} \r\nContent-Length: {}\r\n\r\n",
                body.len()
            );
            stream.write_all((head + &body).as_bytes()).await
        }
        Reply::Bytes(bytes) => stream.write_all(&bytes).await,
        Reply::Drip => {
            for byte in b"HTTP/1.1 200 \r\nX: "
                .iter()
                .chain(std::iter::repeat(&b'x'))
            {
                if stream.write_all(&[*byte]).await.is_err() {
                    break;
                }
                tokio::time::sleep(SOON / 20).await;
            }
            Ok(())
        }
        Reply::Silence => std::future::pending().await,
    };
    // Who asked may have gone.
    sent.unwrap_or_default();
}

fn ok(body: &serde_json::Value) -> Reply {
    Reply::Answer(200, body.to_string())
}

#[tokio::test]
async fn inv_06_inv_21_an_api_that_is_gone_or_garbled_is_an_error_in_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("api.sock");
    let missing = Api::new(path.clone()).get("vm.info", SOON).await;
    assert!(matches!(missing, Err(ApiError::Gone { .. })), "{missing:?}");
    drop(UnixListener::bind(&path).unwrap());
    let refused = Api::new(path).get("vm.info", SOON).await;
    assert!(matches!(refused, Err(ApiError::Gone { .. })), "{refused:?}");

    let endless = format!(
        "HTTP/1.1 200 \r\nContent-Length: {}\r\n\r\n{}",
        4 << 20,
        "x".repeat(2 << 20)
    );
    let endless = move || Reply::Bytes(endless.clone().into());
    let fake = Fake::new(move |request, _| match request {
        "vm.silent" => Reply::Silence,
        "vm.slow" => Reply::Drip,
        "vm.refused" => Reply::Answer(500, json!(["it failed", "since that failed"]).to_string()),
        "vm.old" => Reply::Answer(500, "in plain words\n".to_owned()),
        "vm.full" => Reply::Answer(500, json!(["No space left (os error 28)"]).to_string()),
        "vm.truncated" => Reply::Answer(200, r#"{"state": "Runn"#.to_owned()),
        "vm.cut" => {
            Reply::Bytes(b"HTTP/1.1 200 \r\nContent-Length: 100\r\n\r\n{\"state\"".to_vec())
        }
        "vm.closed" => Reply::Bytes(Vec::new()),
        "vm.garbage" => Reply::Bytes(b"\x00\x01 what?\r\n\r\n".to_vec()),
        "vm.endless" => endless(),
        other => panic!("{other}"),
    });
    let api = fake.api();
    for request in ["vm.silent", "vm.slow"] {
        let begun = Instant::now();
        let answer = api.get(request, SOON).await;
        assert!(
            matches!(answer, Err(ApiError::Timeout { .. })),
            "{answer:?}"
        );
        assert!(begun.elapsed() < 20 * SOON, "{request}");
    }
    let said = async |request| {
        let error = api.get(request, 20 * SOON).await.unwrap_err();
        let text = error.to_string();
        (icebox_engine::host::HostError::from(error).kind(), text)
    };
    let (kind, text) = said("vm.refused").await;
    assert_eq!(kind, ErrorKind::Other);
    assert!(text.ends_with("it failed: since that failed"), "{text}");
    assert!(said("vm.old").await.1.ends_with("in plain words"));
    assert_eq!(said("vm.full").await.0, ErrorKind::Exhausted);
    for request in ["vm.truncated", "vm.garbage", "vm.endless"] {
        let (kind, text) = said(request).await;
        assert_eq!(kind, ErrorKind::Other, "{text}");
        assert!(text.contains("makes no sense"), "{text}");
    }
    for request in ["vm.cut", "vm.closed"] {
        assert_eq!(said(request).await.0, ErrorKind::Gone, "{request}");
    }
}

/// A machine whose process is a stand-in, too.
struct Stand {
    machine: ChMachine,
    process: Process,
    area: PathBuf,
    _directory: TempDir,
}

fn stand(fake: &Fake) -> Stand {
    let directory = tempfile::tempdir().unwrap();
    let outputs = Outputs::create(directory.path()).unwrap();
    let child = Command::new("sleep")
        .arg("600")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let process = Process::watch_child(child).unwrap();
    let area = directory.path().join("save");
    fs::create_dir(&area).unwrap();
    let machine = ChMachine::watch(
        &SandboxId::random(),
        process.clone(),
        outputs,
        directory.path().join("console.log"),
        fake.api(),
        area.clone(),
        false,
    );
    Stand {
        machine,
        process,
        area,
        _directory: directory,
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        self.process.kill().unwrap();
    }
}

fn plan(directory: &Path) -> SavePlan {
    SavePlan {
        device_state: directory.join("device-state"),
        memory: directory.to_owned(),
        restored_from: None,
    }
}

fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).unwrap().next().is_none()
}

#[tokio::test]
async fn inv_08_nothing_is_saved_before_all_memory_is_loaded() {
    let loading = json!(["VM on-demand memory restore is still in progress"]).to_string();
    let fake = Fake::new(move |request, times| match (request, times) {
        ("vm.info", _) => ok(&json!({ "state": "Running" })),
        ("vm.snapshot", 0..3) => Reply::Answer(500, loading.clone()),
        ("vm.snapshot", _) => Reply::Answer(500, json!(["the VM is running"]).to_string()),
        ("vm.pause", _) => Reply::Answer(204, String::new()),
        other => panic!("{other:?}"),
    });
    let it = stand(&fake);
    it.machine.pause_vcpus().await.unwrap();
    let asked = fake.asked();
    assert_eq!(
        asked,
        [
            "vm.info",
            "vm.snapshot",
            "vm.snapshot",
            "vm.snapshot",
            "vm.snapshot",
            "vm.pause"
        ]
    );
    // It is not asked again once that is known.
    it.machine.pause_vcpus().await.unwrap();
    assert_eq!(fake.asked()[6..], ["vm.info", "vm.pause"]);
}

#[tokio::test]
async fn inv_06_inv_11_a_vmm_that_ends_in_the_middle_of_a_save_leaves_nothing_of_it() {
    let victim = Arc::new(Mutex::new(None::<(Process, PathBuf)>));
    let shared = Arc::clone(&victim);
    let fake = Fake::new(move |request, times| match (request, times) {
        ("vm.info", _) => ok(&json!({ "state": "Paused" })),
        ("vm.snapshot", 0) => Reply::Answer(500, json!(["no"]).to_string()),
        ("vm.snapshot", _) => {
            let victim = shared.lock().unwrap();
            let (process, area) = victim.as_ref().unwrap();
            fs::write(area.join("memory-ranges"), [1; 8192]).unwrap();
            process.kill().unwrap();
            Reply::Bytes(Vec::new())
        }
        other => panic!("{other:?}"),
    });
    let it = stand(&fake);
    *victim.lock().unwrap() = Some((it.process.clone(), it.area.clone()));
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(it.machine.probe().await.unwrap(), VcpuState::Paused);
    let error = it.machine.save(plan(directory.path())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
    assert!(error.to_string().contains("killed by signal 9"), "{error}");
    assert!(is_empty(&it.area) && is_empty(directory.path()));
    assert!(!it.machine.exited().await.by_guest);
}

#[tokio::test]
async fn inv_25_what_a_vmm_says_it_saved_is_looked_at_and_copied() {
    let what = Arc::new(Mutex::new((PathBuf::new(), "")));
    let shared = Arc::clone(&what);
    let fake = Fake::new(move |request, times| match (request, times) {
        ("vm.info", _) => ok(&json!({ "state": "Paused" })),
        ("vm.snapshot", 0) => Reply::Answer(500, json!(["no"]).to_string()),
        ("vm.snapshot", _) => {
            let (area, how) = shared.lock().unwrap().clone();
            let (state, memory) = (area.join("state.json"), area.join("memory-ranges"));
            fs::write(&state, "{}").unwrap();
            match how {
                "link" => symlink("/etc/passwd", memory).unwrap(),
                "pipe" => crate::vmm::console::make_fifo(&memory).unwrap(),
                "odd" => fs::write(memory, [7; 5000]).unwrap(),
                "nothing" => {}
                "no state" => fs::write(state, "").unwrap(),
                "whole" => {
                    let pages = [[7; 4096], [0; 4096], [8; 4096]].concat();
                    fs::write(memory, pages).unwrap();
                }
                other => panic!("{other}"),
            }
            Reply::Answer(204, String::new())
        }
        other => panic!("{other:?}"),
    });
    let it = stand(&fake);
    for how in ["link", "pipe", "odd", "nothing", "no state"] {
        *what.lock().unwrap() = (it.area.clone(), how);
        let directory = tempfile::tempdir().unwrap();
        let error = it.machine.save(plan(directory.path())).await;
        assert!(error.is_err(), "{how}");
        assert!(is_empty(&it.area), "{how}");
    }
    *what.lock().unwrap() = (it.area.clone(), "whole");
    let directory = tempfile::tempdir().unwrap();
    let saved = it.machine.save(plan(directory.path())).await.unwrap();
    assert_eq!((saved.pages, saved.changed_pages), (SavedPages::Full, 2));
    assert!(is_empty(&it.area));
    let memory = fs::read(directory.path().join(MEMORY_BASE)).unwrap();
    assert!(memory == [[7; 4096], [0; 4096], [8; 4096]].concat());
    let state = fs::read(directory.path().join("device-state")).unwrap();
    assert_eq!(state, b"{}");
}
