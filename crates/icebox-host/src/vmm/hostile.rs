//! What the real programs cannot be made to do: APIs that are silent, slow, garbled or gone, and saves that are not what
//! they should be. Whatever a VMM with an API does wrong, what is asked of it ends with an error that says so, in time, with
//! nothing left; and who asked can go on. What becomes of a sandbox meanwhile is [`engine`]'s.

mod engine;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use icebox_engine::host::{
    ErrorKind, HostError, Machine, MemorySource, SavePlan, SavedPages, VcpuState,
};
use icebox_engine::id::SandboxId;
use icebox_engine::layout::MEMORY_BASE;
use serde_json::json;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

use super::api::{Api, ApiError, Dialect};
use super::asked::{AskedMachine, Ways};
use super::cloud_hypervisor::machine::ChWays;
use super::firecracker::machine::FirecrackerWays;
use super::own_save::SaveArea;
use super::{cloud_hypervisor, firecracker};
use crate::launcher::Process;
use crate::vmm::console::Outputs;

const SOON: Duration = Duration::from_millis(300);

/// A VMM with an API, and what its requests are called.
#[derive(Clone, Copy)]
struct Kind {
    dialect: &'static Dialect,
    /// Asks for the state.
    probe: &'static str,
    pause: &'static str,
    resume: &'static str,
    save: &'static str,
    /// What it calls the parts of a save.
    parts: [&'static str; 2],
    /// A refusal in its way.
    refusal: fn(&str) -> String,
    machine: fn(Parts) -> Box<dyn Machine>,
}

/// What a machine is made of.
struct Parts {
    sandbox: SandboxId,
    process: Process,
    outputs: Outputs,
    log: PathBuf,
    api: Api,
    area: SaveArea,
}

const KINDS: [Kind; 2] = [
    Kind {
        dialect: &cloud_hypervisor::DIALECT,
        probe: "vm.info",
        pause: "vm.pause",
        resume: "vm.resume",
        save: "vm.snapshot",
        parts: ["state.json", "memory-ranges"],
        refusal: |why| json!(["it failed", why]).to_string(),
        machine: |parts| parts.watched_by(ChWays::new(true)),
    },
    Kind {
        dialect: &firecracker::DIALECT,
        probe: "/",
        pause: "/vm",
        resume: "/vm",
        save: "/snapshot/create",
        parts: ["state", "memory"],
        refusal: |why| json!({ "fault_message": format!("it failed: {why}") }).to_string(),
        machine: |parts| parts.watched_by(FirecrackerWays::default()),
    },
];

impl Parts {
    fn watched_by(self, ways: impl Ways) -> Box<dyn Machine> {
        let (sandbox, log) = (self.sandbox, self.log);
        let (process, outputs) = (self.process, self.outputs);
        let machine =
            AskedMachine::watch(&sandbox, process, outputs, log, self.api, self.area, ways);
        Box::new(machine)
    }
}

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
    dialect: &'static Dialect,
    directory: TempDir,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Fake {
    fn new(
        dialect: &'static Dialect,
        script: impl Fn(&str, usize) -> Reply + Send + Sync + 'static,
    ) -> Self {
        Self::reading(dialect, move |request, _, times| script(request, times))
    }

    /// One that reads the bodies of requests.
    fn reading(
        dialect: &'static Dialect,
        script: impl Fn(&str, &str, usize) -> Reply + Send + Sync + 'static,
    ) -> Self {
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
                    let (request, body) = read_request(&mut stream, dialect).await;
                    let times = {
                        let mut list: std::sync::MutexGuard<'_, Vec<String>> = list.lock().unwrap();
                        let times = list.iter().filter(|it| **it == request).count();
                        list.push(request.clone());
                        times
                    };
                    reply(&mut stream, script(&request, &body, times)).await;
                });
            }
        });
        Self {
            dialect,
            directory,
            asked,
        }
    }

    fn api(&self) -> Api {
        Api::new(self.dialect, self.directory.path().join("api.sock"))
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

/// Reads a request; returns what it is for, and its body.
async fn read_request(stream: &mut UnixStream, dialect: &Dialect) -> (String, String) {
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
    let path = path.strip_prefix(dialect.prefix).unwrap().to_owned();
    (
        path,
        String::from_utf8(bytes.split_off(head.len() + 4)).unwrap(),
    )
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
    // A process that another test has forked, and that has not executed its program yet, would hold it open.
    stream.shutdown().await.unwrap_or_default();
}

fn state_of(word: &str) -> Reply {
    Reply::Answer(200, json!({ "state": word }).to_string())
}

fn done() -> Reply {
    Reply::Answer(204, String::new())
}

#[tokio::test]
async fn inv_06_inv_21_an_api_that_is_gone_or_garbled_is_an_error_in_time() {
    for kind in KINDS {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let missing = Api::new(kind.dialect, path.clone());
        let answer = missing.get("/info", SOON).await;
        assert!(matches!(answer, Err(ApiError::Gone { .. })), "{answer:?}");
        let answer = missing.listens(SOON).await;
        assert!(
            matches!(answer, Err(ApiError::Timeout { .. })),
            "{answer:?}"
        );
        drop(UnixListener::bind(&path).unwrap());
        let answer = missing.get("/info", SOON).await;
        assert!(matches!(answer, Err(ApiError::Gone { .. })), "{answer:?}");

        let endless = format!(
            "HTTP/1.1 200 \r\nContent-Length: {}\r\n\r\n{}",
            4 << 20,
            "x".repeat(2 << 20)
        );
        let endless = move || Reply::Bytes(endless.clone().into());
        let fake = Fake::new(kind.dialect, move |request, _| match request {
            "/silent" => Reply::Silence,
            "/slow" => Reply::Drip,
            "/refused" => Reply::Answer(500, (kind.refusal)("since that failed")),
            "/plain" => Reply::Answer(500, "in plain words\n".to_owned()),
            "/full" => Reply::Answer(500, (kind.refusal)("No space left (os error 28)")),
            "/truncated" => Reply::Answer(200, r#"{"state": "Runn"#.to_owned()),
            "/cut" => {
                Reply::Bytes(b"HTTP/1.1 200 \r\nContent-Length: 100\r\n\r\n{\"state\"".to_vec())
            }
            "/closed" => Reply::Bytes(Vec::new()),
            "/garbage" => Reply::Bytes(b"\x00\x01 what?\r\n\r\n".to_vec()),
            "/endless" => endless(),
            other => panic!("{other}"),
        });
        let api = fake.api();
        api.listens(SOON).await.unwrap();
        for request in ["/silent", "/slow"] {
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
            assert!(text.contains(kind.dialect.name), "{text}");
            (HostError::from(error).kind(), text)
        };
        let (told, text) = said("/refused").await;
        assert_eq!(told, ErrorKind::Other);
        assert!(text.ends_with("it failed: since that failed"), "{text}");
        assert!(said("/plain").await.1.ends_with("in plain words"));
        assert_eq!(said("/full").await.0, ErrorKind::Exhausted);
        for request in ["/truncated", "/garbage", "/endless"] {
            let (told, text) = said(request).await;
            assert_eq!(told, ErrorKind::Other, "{text}");
            assert!(text.contains("makes no sense"), "{text}");
        }
        for request in ["/cut", "/closed"] {
            assert_eq!(said(request).await.0, ErrorKind::Gone, "{request}");
        }
    }
}

/// A machine whose process is a stand-in, too.
struct Stand {
    machine: Box<dyn Machine>,
    process: Process,
    area: PathBuf,
    _directory: TempDir,
}

fn process() -> Process {
    let child = Command::new("sleep")
        .arg("600")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    Process::watch_child(child).unwrap()
}

fn stand(kind: &Kind, fake: &Fake) -> Stand {
    let directory = tempfile::tempdir().unwrap();
    let outputs = Outputs::create(directory.path()).unwrap();
    let process = process();
    let area = directory.path().join("save");
    fs::create_dir(&area).unwrap();
    let machine = (kind.machine)(Parts {
        sandbox: SandboxId::random(),
        process: process.clone(),
        outputs,
        log: directory.path().join("console.log"),
        api: fake.api(),
        area: SaveArea::new(area.clone()),
    });
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

/// What an API does wrong, and what that is reported as.
const WRONGS: [(&str, ErrorKind); 7] = [
    ("silent", ErrorKind::Timeout),
    ("slow", ErrorKind::Timeout),
    ("refuses", ErrorKind::Other),
    ("no room", ErrorKind::Exhausted),
    ("truncated", ErrorKind::Other),
    ("garbage", ErrorKind::Other),
    ("closed", ErrorKind::Gone),
];

fn wrong(kind: &Kind, how: &str) -> Reply {
    match how {
        "silent" => Reply::Silence,
        "slow" => Reply::Drip,
        "refuses" => Reply::Answer(500, (kind.refusal)("no")),
        "no room" => Reply::Answer(500, (kind.refusal)("full (os error 28)")),
        // Of an answer without a body, the head.
        "truncated" => Reply::Bytes(b"HTTP/1.1 2".to_vec()),
        "garbage" => Reply::Bytes(b"\x00\x01 what?\r\n\r\n".to_vec()),
        "closed" => Reply::Bytes(Vec::new()),
        other => panic!("{other}"),
    }
}

/// The clock stands still but for waits, which are over at once: none of them is without an end.
#[tokio::test(start_paused = true)]
async fn inv_06_inv_11_inv_21_whatever_an_api_does_wrong_ends_in_an_error_and_the_next_request_works()
 {
    for kind in KINDS {
        for (how, expected) in WRONGS {
            for verb in ["probe", "pause", "resume", "save"] {
                // It does wrong once: what is asked for then works.
                let state = if verb == "pause" { "Running" } else { "Paused" };
                let fails = match verb {
                    "probe" => kind.probe,
                    "pause" => kind.pause,
                    "resume" => kind.resume,
                    _ => kind.save,
                };
                let script = Kind { ..kind };
                let fake = Fake::new(kind.dialect, move |request, times| {
                    if request == fails && times == 0 {
                        wrong(&script, how)
                    } else if request == script.probe {
                        state_of(state)
                    } else if request == script.save {
                        Reply::Answer(500, (script.refusal)("asked twice"))
                    } else {
                        done()
                    }
                });
                let it = stand(&kind, &fake);
                let directory = tempfile::tempdir().unwrap();
                let act = async || match verb {
                    "probe" => it.machine.probe().await.map(drop),
                    "pause" => it.machine.pause_vcpus().await,
                    "resume" => it.machine.resume_vcpus().await,
                    _ => it.machine.save(plan(directory.path())).await.map(drop),
                };
                let case = format!("{}: {verb}: {how}", kind.dialect.name);
                let error = act().await.expect_err(&case);
                let gone = how == "truncated" && error.kind() == ErrorKind::Gone;
                assert!(error.kind() == expected || gone, "{case}: {error:?}");
                assert!(is_empty(&it.area) && is_empty(directory.path()), "{case}");
                let again = act().await;
                match verb {
                    "save" => {
                        let error = again.expect_err(&case).to_string();
                        assert!(error.ends_with("asked twice"), "{case}: {error}");
                    }
                    _ => again.expect(&case),
                }
            }
        }
    }
}

#[tokio::test]
async fn inv_08_nothing_is_saved_before_all_memory_is_loaded() {
    let loading = json!(["VM on-demand memory restore is still in progress"]).to_string();
    let dialect = &cloud_hypervisor::DIALECT;
    let fake = Fake::new(dialect, move |request, times| match (request, times) {
        ("vm.info", _) => state_of("Running"),
        ("vm.snapshot", 0..3) => Reply::Answer(500, loading.clone()),
        ("vm.snapshot", _) => Reply::Answer(500, json!(["the VM is running"]).to_string()),
        ("vm.pause", _) => done(),
        other => panic!("{other:?}"),
    });
    let lazy = Kind {
        machine: |parts| parts.watched_by(ChWays::new(false)),
        ..KINDS[0]
    };
    let it = stand(&lazy, &fake);
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
    for kind in KINDS {
        let victim = Arc::new(Mutex::new(None::<(Process, PathBuf)>));
        let shared = Arc::clone(&victim);
        let fake = Fake::new(kind.dialect, move |request, _| {
            if request != kind.save {
                assert_eq!(request, kind.probe);
                return state_of("Paused");
            }
            let victim = shared.lock().unwrap();
            let (process, area) = victim.as_ref().unwrap();
            fs::write(area.join(kind.parts[1]), [1; 8192]).unwrap();
            process.kill().unwrap();
            Reply::Bytes(Vec::new())
        });
        let it = stand(&kind, &fake);
        *victim.lock().unwrap() = Some((it.process.clone(), it.area.clone()));
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(it.machine.probe().await.unwrap(), VcpuState::Paused);
        let error = it.machine.save(plan(directory.path())).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
        assert!(error.to_string().contains("killed by signal 9"), "{error}");
        assert!(is_empty(&it.area) && is_empty(directory.path()));
        assert!(!it.machine.exited().await.by_guest);
    }
}

#[tokio::test]
async fn inv_25_what_a_vmm_says_it_saved_is_looked_at_and_copied() {
    for kind in KINDS {
        let what = Arc::new(Mutex::new((PathBuf::new(), "")));
        let shared = Arc::clone(&what);
        let fake = Fake::new(kind.dialect, move |request, _| {
            if request != kind.save {
                assert_eq!(request, kind.probe);
                return state_of("Paused");
            }
            let (area, how) = shared.lock().unwrap().clone();
            let [state, memory] = kind.parts.map(|part| area.join(part));
            fs::write(&state, "{}").unwrap();
            match how {
                "link" => symlink("/etc/passwd", memory).unwrap(),
                "pipe" => super::console::make_fifo(&memory).unwrap(),
                "odd" => fs::write(memory, [7; 5000]).unwrap(),
                "nothing" => {}
                "no state" => fs::write(state, "").unwrap(),
                "whole" => {
                    let pages = [[7; 4096], [0; 4096], [8; 4096]].concat();
                    fs::write(memory, pages).unwrap();
                }
                other => panic!("{other}"),
            }
            done()
        });
        let it = stand(&kind, &fake);
        for how in ["link", "pipe", "odd", "nothing", "no state"] {
            *what.lock().unwrap() = (it.area.clone(), how);
            let directory = tempfile::tempdir().unwrap();
            let error = it.machine.save(plan(directory.path())).await;
            assert!(error.is_err(), "{how}");
            assert!(is_empty(&it.area), "{how}");
        }
        *what.lock().unwrap() = (it.area.clone(), "whole");
        let directory = tempfile::tempdir().unwrap();
        let save = it.machine.save(plan(directory.path())).await.unwrap();
        assert!(is_empty(&it.area));
        let saved = save.finish().await.unwrap();
        assert_eq!((saved.pages, saved.changed_pages), (SavedPages::Full, 2));
        let memory = fs::read(directory.path().join(MEMORY_BASE)).unwrap();
        assert!(memory == [[7; 4096], [0; 4096], [8; 4096]].concat());
        let state = fs::read(directory.path().join("device-state")).unwrap();
        assert_eq!(state, b"{}");
    }
}

/// A save of a guest that was restored names what its memory is mapped over; a VMM that maps something else, or says that
/// the memory is of another size, has saved nothing.
#[tokio::test]
async fn inv_10_inv_25_changes_are_only_taken_against_the_memory_that_is_mapped() {
    let kind = &KINDS[1];
    let what = Arc::new(Mutex::new((PathBuf::new(), 0)));
    let shared = Arc::clone(&what);
    let fake = Fake::new(kind.dialect, move |request, _| {
        if request != KINDS[1].save {
            return state_of("Paused");
        }
        let (area, length) = shared.lock().unwrap().clone();
        fs::write(area.join("state"), "{}").unwrap();
        fs::write(area.join("memory"), vec![1; length]).unwrap();
        done()
    });
    let it = stand(kind, &fake);
    let old = tempfile::NamedTempFile::new().unwrap();
    old.as_file().set_len(8 << 12).unwrap();
    for (length, why) in [(4 << 12, "compare"), (8 << 12, "does not map")] {
        *what.lock().unwrap() = (it.area.clone(), length);
        let directory = tempfile::tempdir().unwrap();
        let plan = SavePlan {
            restored_from: Some(MemorySource {
                base: old.path().to_owned(),
                diff: None,
            }),
            ..plan(directory.path())
        };
        let error = it.machine.save(plan).await.unwrap_err();
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        let said = format!("{error}: {}", cause.unwrap_or_default());
        assert!(said.contains(why), "{said}");
        assert!(is_empty(&it.area));
        assert!(!directory.path().join(MEMORY_BASE).exists());
    }
}
