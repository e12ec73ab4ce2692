//! The engine's way to guests: the agent's host-only calls, over the slot's address.
//!
//! Readiness is a round trip, and the wait for it is the last part of every create and resume. So nothing here waits for
//! long, and no wait depends on TCP's own timers: a guest that boots loses the first SYNs, and the kernel would send the next
//! one only a second later. But where many guests share a processor, an answer takes its time, and must not come too late for
//! an attempt that has been given up. So attempts overlap, and the longer a guest has been waited for, the longer they last and
//! the fewer they are: to be asked is work for a guest, and many that are asked often have no time left to answer.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use icebox_agent_api::client::{AgentClient, AgentError, Connector, IoStream};
use icebox_agent_api::control::{Clock, Identity, Init, Origin, Prepare};
use icebox_agent_api::{AGENT_PORT, START_TAG, Token};
use icebox_engine::host::{
    ErrorKind, Guest, GuestAddress, GuestOrigin, HostError, Secret, Welcome,
};
use icebox_engine::id::SandboxId;
use sha2::{Digest as _, Sha256};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

/// From one attempt to connect to the next, at first. An answer over a tap takes well under a millisecond; an emulated guest
/// that is busy starting takes longer.
const CONNECT: Duration = Duration::from_millis(20);
/// Later it is this part of all the time that a guest has been waited for which boots: so much later than it could be, one
/// that begins to listen is found.
const BOOTS: u32 = 50;
/// The same of a guest that has been running, and listens. What it is asked waits for it in its tap, so once would do.
const LISTENS: u32 = 4;
/// How many attempts wait at once. So an answer may take two fifths of the time that a guest has been waited for which boots.
const AT_ONCE: u32 = 20;
/// Between attempts that were refused at once.
const BETWEEN: Duration = Duration::from_millis(2);
/// How long the first welcome may take: reaching the agent, identity, clock, entropy, closing connections. Each later one may
/// take as much longer as the guest has been waited for: all of it is lost if it is given up too soon.
const WELCOME: Duration = Duration::from_secs(10);
/// If the welcome took longer, the clock that it set is behind by up to as much, and is set right. Most of a first call's
/// time is the guest's, which boots, or loads the pages that it needs.
const PROMPT: Duration = Duration::from_millis(500);
/// What is close enough to the host's clock not to be looked at again.
const CLOSE: Duration = Duration::from_millis(20);
/// How often a guest's clock is read at most. The quickest answer counts.
const READINGS: usize = 8;
/// How long all of that may take.
const CLOCK: Duration = Duration::from_secs(5);
/// How long the guest may prepare for a capture. The engine gives up a moment later (INV-05).
const PREPARE: Duration = Duration::from_millis(4500);
/// How long a guest may take to say what runs in it.
const WORKING: Duration = Duration::from_secs(3);
/// Random bytes that a guest is given: the size of the kernel's own seed, twice.
const ENTROPY: usize = 64;
/// The status of a request with a token that is not in force.
const UNAUTHORIZED: u16 = 401;

/// Talks to agents at their sandboxes' addresses.
#[derive(Debug, Default)]
pub struct AgentGuests;

/// How long a guest is waited for, and how often it is asked meanwhile.
#[derive(Clone, Copy, Debug)]
struct Patience {
    since: Instant,
    /// [`BOOTS`] or [`LISTENS`].
    part: u32,
}

impl Patience {
    fn with(origin: GuestOrigin) -> Self {
        Self {
            since: Instant::now(),
            part: match origin {
                GuestOrigin::Boot => BOOTS,
                GuestOrigin::Resume | GuestOrigin::Fork => LISTENS,
            },
        }
    }

    /// With a guest that has been welcomed.
    fn with_running() -> Self {
        Self::with(GuestOrigin::Resume)
    }

    /// From one attempt to connect to the next.
    fn pause(&self) -> Duration {
        CONNECT.max(self.since.elapsed() / self.part)
    }

    /// For a welcome that begins now.
    fn welcome(&self) -> Duration {
        WELCOME + self.since.elapsed()
    }
}

/// Connects again and again, until the guest is there.
#[derive(Debug)]
struct Patient {
    address: SocketAddr,
    patience: Patience,
}

impl Connector for Patient {
    fn connect(&self) -> Pin<Box<dyn Future<Output = io::Result<Box<dyn IoStream>>> + Send + '_>> {
        Box::pin(async {
            let stream = first(self.patience, || TcpStream::connect(self.address)).await;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn IoStream>)
        })
    }
}

/// The first of many attempts that succeeds. More are made until then.
async fn first<S, A>(patience: Patience, attempt: impl Fn() -> A) -> S
where
    A: Future<Output = io::Result<S>>,
{
    let mut attempts = FuturesUnordered::new();
    loop {
        let wait = patience.pause();
        attempts.push(timeout(wait * AT_ONCE, attempt()));
        let ended = async {
            loop {
                match attempts.next().await {
                    Some(Ok(ended)) => return ended,
                    Some(Err(_)) => {}
                    None => std::future::pending().await,
                }
            }
        };
        match timeout(wait, ended).await {
            Ok(Ok(stream)) => return stream,
            // Nobody listens yet, or there is no way to the guest yet.
            Ok(Err(_)) => sleep(BETWEEN).await,
            Err(_) => {}
        }
    }
}

fn client_with(patience: Patience, at: GuestAddress, token: &Secret) -> AgentClient {
    let address = SocketAddr::from((at.ip, AGENT_PORT));
    AgentClient::new(Patient { address, patience }).with_token(&Token::new(token.expose()))
}

/// To a guest that has been welcomed.
fn client(at: GuestAddress, token: &Secret) -> AgentClient {
    client_with(Patience::with_running(), at, token)
}

/// 128 bits that belong to one sandbox for ever, machine-id(5): the same after a resume, another in a fork.
fn machine_id(sandbox: &SandboxId) -> String {
    let digest = Sha256::digest(sandbox.as_str());
    digest[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn init(welcome: &Welcome) -> Result<Init, HostError> {
    let failed =
        |what: &str| HostError::new(ErrorKind::Other, format!("welcome the guest: {what}"));
    let now = unix_now()?;
    let mut entropy = vec![0; ENTROPY];
    let filled = rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty());
    if filled != Ok(ENTROPY) {
        return Err(failed("the host has no random bytes"));
    }
    Ok(Init {
        origin: match welcome.origin {
            GuestOrigin::Boot => Origin::Boot,
            GuestOrigin::Resume => Origin::Resume,
            GuestOrigin::Fork => Origin::Fork,
        },
        identity: Identity {
            sandbox_id: welcome.sandbox.to_string(),
            template_id: welcome.template.clone(),
            hostname: welcome.hostname.clone(),
            machine_id: machine_id(&welcome.sandbox),
        },
        access_token: Some(Token::new(welcome.token.expose())),
        env: welcome.env.clone(),
        clock_unix_ns: u64::try_from(now.as_nanos()).map_err(|_| failed("it is after 2554"))?,
        entropy,
        default_user: welcome.login.user.clone(),
        default_workdir: welcome.login.workdir.clone(),
        close_connections: welcome.origin != GuestOrigin::Boot,
    })
}

fn failed(error: AgentError) -> HostError {
    let kind = match &error {
        AgentError::Unreachable { .. } => ErrorKind::Gone,
        AgentError::TimedOut { .. } => ErrorKind::Timeout,
        _ => ErrorKind::Other,
    };
    HostError::new(kind, "talk to the guest's agent").caused_by(error)
}

fn unix_now() -> Result<Duration, HostError> {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(|error| {
            HostError::new(ErrorKind::Other, "the host's clock is before 1970").caused_by(error)
        })
}

/// Moves the guest's clock by what it differs from the host's. Half of the quickest answer's time is how far it can be off
/// then; how long the move takes does not matter.
async fn set_clock_right(client: &AgentClient) -> Result<(), HostError> {
    let until = Instant::now() + CLOCK;
    let mut best: Option<(Duration, i128)> = None;
    for _ in 0..READINGS {
        let (asked, begun) = (unix_now()?, Instant::now());
        let left = until.saturating_duration_since(begun);
        let report = match client.clock(Clock { step_ns: 0 }, left).await {
            Ok(report) => report,
            Err(AgentError::TimedOut { .. }) if best.is_some() => break,
            Err(error) => return Err(failed(error)),
        };
        let took = begun.elapsed();
        if best.is_none_or(|(quickest, _)| took < quickest) {
            // Integers of this size hold any two times and their difference.
            let (then, guest) = ((asked + took / 2).as_nanos(), u128::from(report.unix_ns));
            best = Some((took, then.cast_signed() - guest.cast_signed()));
        }
        if took <= CLOSE {
            break;
        }
    }
    let (took, behind) = best.unwrap_or_default();
    if behind.unsigned_abs() <= CLOSE.as_nanos() {
        return Ok(());
    }
    let step_ns = i64::try_from(behind).unwrap_or(i64::MAX);
    client
        .clock(Clock { step_ns }, CLOCK)
        .await
        .map_err(failed)?;
    tracing::debug!(
        step_ns,
        within_ms = took.as_millis() / 2,
        "set the guest's clock right"
    );
    Ok(())
}

#[async_trait]
impl Guest for AgentGuests {
    async fn welcome(&self, at: GuestAddress, welcome: &Welcome) -> Result<(), HostError> {
        // The answer to an attempt that was carried out may have been lost: then the new token is in force already.
        let tokens = [&welcome.current_token, &welcome.token];
        let mut token = 0;
        let patience = Patience::with(welcome.origin);
        loop {
            let attempt = client_with(patience, at, tokens[token]);
            let asked = Instant::now();
            match attempt.init(&init(welcome)?, patience.welcome()).await {
                Ok(report) => {
                    if asked.elapsed() > PROMPT
                        && let Err(error) = set_clock_right(&client(at, &welcome.token)).await
                    {
                        tracing::warn!(sandbox = %welcome.sandbox, %error, "the guest's clock is behind");
                    }
                    if !report.problems.is_empty() {
                        tracing::warn!(sandbox = %welcome.sandbox, problems = ?report.problems, "the guest is welcome, but not as it should be");
                    }
                    return Ok(());
                }
                Err(error) if error.status() == Some(UNAUTHORIZED) => {
                    token += 1;
                    if token == tokens.len() {
                        return Err(failed(error));
                    }
                }
                Err(AgentError::Unreachable { .. } | AgentError::TimedOut { .. }) => {
                    sleep(BETWEEN).await;
                }
                Err(error) => return Err(failed(error)),
            }
        }
    }

    async fn prepare(&self, at: GuestAddress, token: &Secret) -> Result<(), HostError> {
        quiesce(at, token, Trim::Yes).await
    }

    async fn is_working(&self, at: GuestAddress, token: &Secret) -> Result<bool, HostError> {
        let running = client(at, token).list(WORKING).await.map_err(failed)?;
        let of_template = |tag: &Option<String>| tag.as_deref() == Some(START_TAG);
        Ok(running.iter().any(|process| !of_template(&process.tag)))
    }

    async fn set_clock(&self, at: GuestAddress, token: &Secret) -> Result<(), HostError> {
        set_clock_right(&client(at, token)).await
    }

    async fn sync(&self, at: GuestAddress, token: &Secret) -> Result<(), HostError> {
        quiesce(at, token, Trim::No).await
    }
}

/// Whether the guest tells its disk which blocks are free.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trim {
    Yes,
    No,
}

/// Has the guest write out what it has cached.
///
/// The caches themselves stay. Dropping them makes no capture smaller, since freed pages keep their content, and every
/// guest that is restored from it would read its programs from disk again, into pages of its own.
async fn quiesce(at: GuestAddress, token: &Secret, trim: Trim) -> Result<(), HostError> {
    let prepare = Prepare {
        sync: true,
        drop_caches: false,
        trim: trim == Trim::Yes,
        timeout_ms: u32::try_from(PREPARE.as_millis()).unwrap_or(u32::MAX),
    };
    let report = client(at, token)
        .prepare(&prepare, PREPARE)
        .await
        .map_err(failed)?;
    tracing::debug!(address = %at.ip, ?report, "the guest prepared");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::Ipv4Addr;

    use icebox_agent_api::control::{ClockReport, InitReport};
    use icebox_engine::manifest::v1::Login;
    use serde::de::DeserializeOwned;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn inv_37_a_machine_id_belongs_to_one_sandbox() {
        let (one, other) = (SandboxId::random(), SandboxId::random());
        assert_eq!(machine_id(&one), machine_id(&one));
        assert_ne!(machine_id(&one), machine_id(&other));
        assert_eq!(machine_id(&one).len(), 32);
    }

    fn welcome(origin: GuestOrigin) -> Welcome {
        Welcome {
            current_token: Secret::random(),
            token: Secret::random(),
            sandbox: SandboxId::random(),
            template: "t".into(),
            hostname: "box".into(),
            env: BTreeMap::new(),
            login: Login::default(),
            origin,
        }
    }

    #[test]
    fn inv_37_every_welcome_carries_other_random_bytes_and_the_time() {
        let welcome = welcome(GuestOrigin::Fork);
        let (first, second) = (init(&welcome).unwrap(), init(&welcome).unwrap());
        assert_ne!(first.entropy, second.entropy);
        assert!(second.clock_unix_ns >= first.clock_unix_ns);
        assert!(first.close_connections);
        assert!(
            !init(&self::welcome(GuestOrigin::Boot))
                .unwrap()
                .close_connections
        );
    }

    #[tokio::test]
    async fn a_connection_is_made_as_soon_as_somebody_listens() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let connecting = tokio::spawn(async move {
            let patience = Patience::with(GuestOrigin::Boot);
            let patient = Patient { address, patience };
            let mut stream = patient.connect().await.unwrap();
            stream.write_all(b"hello").await.unwrap();
        });
        tokio::task::yield_now().await;
        let listener = TcpListener::bind(address).await.unwrap();
        let (mut stream, _) = timeout(Duration::from_secs(5), listener.accept())
            .await
            .unwrap()
            .unwrap();
        let mut said = [0; 5];
        stream.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"hello");
        connecting.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_is_slow_to_answer_is_reached() {
        // Each attempt is answered long after the next ones have begun, and those before were given up at first.
        const SLOW: Duration = Duration::from_millis(400);
        for (origin, most) in [(GuestOrigin::Boot, 100), (GuestOrigin::Fork, 20)] {
            let asked = std::cell::Cell::new(0);
            let patience = Patience::with(origin);
            let reached = first(patience, || {
                asked.set(asked.get() + 1);
                async {
                    sleep(SLOW).await;
                    Ok(())
                }
            });
            timeout(SLOW * 10, reached).await.unwrap();
            assert!(patience.since.elapsed() >= SLOW);
            // It is asked seldom.
            assert!(asked.get() < most, "{origin:?}: {}", asked.get());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_has_been_slow_is_given_more_time_and_asked_no_more_often() {
        const WAITED: Duration = Duration::from_secs(20);
        let patience = Patience::with(GuestOrigin::Fork);
        assert_eq!((patience.pause(), patience.welcome()), (CONNECT, WELCOME));
        // A welcome was given up, and with it the connection.
        sleep(WAITED).await;
        assert_eq!(patience.welcome(), WELCOME + WAITED);
        let asked = std::cell::Cell::new(0);
        let reached = first(patience, || {
            asked.set(asked.get() + 1);
            async {
                sleep(WAITED).await;
                Ok(())
            }
        });
        reached.await;
        assert!(asked.get() < 5, "{}", asked.get());
    }

    /// Answers one call, as an agent does, after `delay`; returns what was asked.
    async fn answer<Q: DeserializeOwned>(
        listener: &TcpListener,
        delay: Duration,
        reply: impl FnOnce(&Q) -> String,
    ) -> Q {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = Vec::new();
        let asked = loop {
            stream.read_buf(&mut request).await.unwrap();
            let body = request.windows(4).position(|end| end == b"\r\n\r\n");
            if let Some(asked) =
                body.and_then(|end| serde_json::from_slice::<Q>(&request[end + 4..]).ok())
            {
                break asked;
            }
        };
        sleep(delay).await;
        let reply = reply(&asked);
        let length = reply.len();
        let response = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{reply}");
        stream.write_all(response.as_bytes()).await.unwrap();
        asked
    }

    #[tokio::test]
    async fn inv_37_a_guest_that_took_long_gets_its_clock_set_right() {
        const SLOW: Duration = Duration::from_millis(600);
        const BEHIND: Duration = Duration::from_secs(3);
        let ip = Ipv4Addr::new(127, 49, 98, 3);
        let listener = TcpListener::bind((ip, AGENT_PORT)).await.unwrap();
        let welcomed = tokio::spawn(async move {
            let at = GuestAddress { ip };
            AgentGuests.welcome(at, &welcome(GuestOrigin::Fork)).await
        });
        answer::<Init>(&listener, SLOW, |_| {
            serde_json::to_string(&InitReport {
                envd_version: String::new(),
                agent_version: String::new(),
                boot_id: String::new(),
                clock_step_ns: 0,
                connections_closed: 0,
                problems: Vec::new(),
            })
            .unwrap()
        })
        .await;
        let clock = |_: &Clock| {
            let guest = unix_now().unwrap() - BEHIND;
            let unix_ns = u64::try_from(guest.as_nanos()).unwrap();
            serde_json::to_string(&ClockReport { unix_ns }).unwrap()
        };
        // A slow answer says little; the quick one after it counts.
        let asked: Clock = answer(&listener, SLOW, clock).await;
        assert_eq!(asked.step_ns, 0);
        let mut moved = answer(&listener, Duration::ZERO, clock).await;
        while moved.step_ns == 0 {
            // A busy machine may have made that one slow, too.
            moved = answer(&listener, Duration::ZERO, clock).await;
        }
        welcomed.await.unwrap().unwrap();
        let error = i128::from(moved.step_ns) - BEHIND.as_nanos().cast_signed();
        assert!(
            error.unsigned_abs() < SLOW.as_nanos() / 2,
            "off by {error} ns"
        );
    }
}
