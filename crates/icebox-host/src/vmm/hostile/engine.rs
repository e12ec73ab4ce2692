//! A sandbox whose VMM's API does wrong, seen from the engine.
//!
//! Guests, disks and the store are the simulation's, which notices a capture that is not one instant, a guest that stands
//! still and whatever is left. Between the engine and each guest is a driver of ours and the API that it talks to, which
//! goes wrong when it is told to: before it does what it is asked for, or after.

use std::collections::BTreeMap;

use async_trait::async_trait;
use futures_util::FutureExt as _;
use icebox_engine::host::{
    Capabilities, DiskSwitch, ExitReason, LaunchPlan, Meter, ProcessIdentity, Removed, Save, Vmm,
    VmmIdentity,
};
use icebox_engine::id::GenerationNo;
use icebox_engine::manifest::v1::{Login, Point};
use icebox_engine::unit::{Bytes, Geometry};
use icebox_engine::{Config, CreateRequest, Engine, Error, ImageRequest, Phase};
use icebox_sim::{FreezeBy, World};
use rustix::io::Errno;
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

use super::*;

/// What goes wrong.
#[derive(Clone, Copy, Debug)]
struct Trouble {
    /// With which request; with every one if it is not said.
    request: Option<&'static str>,
    how: &'static str,
    /// Whether what was asked for has been done by then.
    after: bool,
    /// How often.
    times: usize,
}

/// A VMM with an API, over that of the simulation.
struct Between {
    kind: Kind,
    world: World,
    inner: Arc<dyn Vmm>,
    trouble: Arc<Mutex<Option<Trouble>>>,
    seats: Mutex<BTreeMap<SandboxId, Arc<Seat>>>,
}

/// What the engine wants saved, and what came of it.
type Wanted = Arc<Mutex<(Option<SavePlan>, Option<Save>)>>;

/// One guest, and the way to it.
struct Seat {
    /// Of the simulation.
    guest: Arc<dyn Machine>,
    /// Ours.
    machine: Box<dyn Machine>,
    process: Process,
    save: Wanted,
    _fake: Fake,
    _directory: TempDir,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.process.kill().unwrap();
    }
}

/// Ends a process, and waits until it has, though not for what it leaves to its parent.
fn end(process: &Process) {
    process.kill().unwrap();
    let pid = i32::try_from(process.identity().pid).unwrap();
    let child = WaitId::Pid(Pid::from_raw(pid).unwrap());
    match waitid(child, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
        // Somebody has seen its end already.
        Ok(_) | Err(Errno::CHILD) => {}
        Err(error) => panic!("{error}"),
    }
}

fn now<T>(work: impl Future<Output = Result<T, HostError>>) -> T {
    let done = work.now_or_never().expect("the simulation does not wait");
    done.unwrap()
}

/// Does what an API is asked for.
fn act(kind: &Kind, request: &str, guest: &dyn Machine, area: &Path, save: &Wanted) -> Reply {
    match request {
        "probe" => match now(guest.probe()) {
            VcpuState::Running => state_of("Running"),
            _ => state_of("Paused"),
        },
        "pause" => {
            now(guest.pause_vcpus());
            done()
        }
        "resume" => {
            now(guest.resume_vcpus());
            done()
        }
        _ => {
            let mut save = save.lock().unwrap();
            let plan = save.0.clone().expect("nobody wants a save");
            save.1 = Some(now(guest.save(plan)));
            for part in kind.parts {
                fs::write(area.join(part), [1; 4096]).unwrap();
            }
            done()
        }
    }
}

impl Kind {
    /// Which of the four things that it is asked for a request is.
    fn request(&self, path: &str, body: &str) -> &'static str {
        match path {
            _ if path == self.probe => "probe",
            _ if path == self.save => "save",
            _ if self.pause != self.resume && path == self.pause => "pause",
            _ if path == self.resume && body.contains("Paused") => "pause",
            _ if path == self.resume => "resume",
            other => panic!("{other}"),
        }
    }
}

impl Between {
    /// Puts a driver and an API between the engine and a guest.
    fn seat(&self, sandbox: &SandboxId, guest: Arc<dyn Machine>) -> Arc<Seat> {
        let (kind, world, id) = (self.kind, self.world.clone(), sandbox.clone());
        let trouble = Arc::clone(&self.trouble);
        let directory = tempfile::tempdir().unwrap();
        let area = directory.path().join("save");
        fs::create_dir(&area).unwrap();
        let (process, save) = (process(), Wanted::default());
        let (victim, behind) = (process.clone(), Arc::clone(&guest));
        let (into, written) = (area.clone(), Arc::clone(&save));
        let fake = Fake::reading(kind.dialect, move |path, body, _| {
            let request = kind.request(path, body);
            let act = || act(&kind, request, &*behind, &into, &written);
            let mut trouble = trouble.lock().unwrap();
            let is_meant =
                |it: &&mut Trouble| it.times > 0 && it.request.is_none_or(|it| it == request);
            let Some(strikes) = trouble.as_mut().filter(is_meant) else {
                return act();
            };
            strikes.times -= 1;
            if strikes.after {
                act();
            }
            if strikes.how != "ends" {
                return wrong(&kind, strikes.how);
            }
            world.crash_vmm(&id);
            end(&victim);
            Reply::Bytes(Vec::new())
        });
        let machine = (kind.machine)(Parts {
            sandbox: sandbox.clone(),
            process: process.clone(),
            outputs: Outputs::create(directory.path()).unwrap(),
            log: directory.path().join("console.log"),
            api: fake.api(),
            area: SaveArea::new(area),
        });
        Arc::new(Seat {
            guest,
            machine,
            process,
            save,
            _fake: fake,
            _directory: directory,
        })
    }
}

#[async_trait]
impl Vmm for Between {
    fn identity(&self) -> &VmmIdentity {
        self.inner.identity()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            disk_switch: false,
            ..self.inner.capabilities()
        }
    }

    async fn launch(&self, plan: LaunchPlan) -> Result<Arc<dyn Machine>, HostError> {
        let sandbox = plan.sandbox.clone();
        let guest = self.inner.launch(plan).await?;
        let seat = self.seat(&sandbox, guest);
        let mut seats = self.seats.lock().unwrap();
        seats.insert(sandbox, Arc::clone(&seat));
        Ok(seat)
    }

    async fn adopt(
        &self,
        _sandbox: &SandboxId,
        _recorded: Option<&ProcessIdentity>,
    ) -> Result<Option<Arc<dyn Machine>>, HostError> {
        panic!("no daemon starts again here");
    }

    async fn kill(
        &self,
        sandbox: &SandboxId,
        recorded: Option<&ProcessIdentity>,
    ) -> Result<Removed, HostError> {
        let seat = self.seats.lock().unwrap().remove(sandbox);
        if let Some(seat) = seat {
            end(&seat.process);
        }
        self.inner.kill(sandbox, recorded).await
    }
}

#[async_trait]
impl Machine for Seat {
    fn process(&self) -> ProcessIdentity {
        self.guest.process()
    }

    async fn probe(&self) -> Result<VcpuState, HostError> {
        self.machine.probe().await
    }

    async fn pause_vcpus(&self) -> Result<(), HostError> {
        self.machine.pause_vcpus().await
    }

    async fn resume_vcpus(&self) -> Result<(), HostError> {
        self.machine.resume_vcpus().await
    }

    /// What the driver takes of the API's save is looked at in its own tests; here counts what the simulation saved.
    async fn save(&self, wanted: SavePlan) -> Result<Save, HostError> {
        *self.save.lock().unwrap() = (Some(wanted), None);
        let directory = tempfile::tempdir().unwrap();
        let own = self.machine.save(plan(directory.path())).await?;
        let saved = self.save.lock().unwrap().1.take();
        let saved = saved.expect("the driver says that it has saved what it has not");
        Ok(Save::Rest(Box::pin(async move {
            let _until_it_is_copied = directory;
            own.finish().await?;
            saved.finish().await
        })))
    }

    async fn stalled(&self) {
        self.machine.stalled().await;
    }

    fn meter(&self) -> Result<Box<dyn Meter>, HostError> {
        self.guest.meter()
    }

    fn disk_switch(&self) -> Option<&dyn DiskSwitch> {
        None
    }

    async fn exited(&self) -> ExitReason {
        self.machine.exited().await
    }
}

/// An engine over such a VMM.
struct Scene {
    world: World,
    engine: Engine,
    trouble: Arc<Mutex<Option<Trouble>>>,
}

impl Scene {
    /// With a sandbox `a` that has been paused once, and runs.
    async fn set(kind: Kind) -> (Self, SandboxId) {
        let world = World::new();
        let trouble = Arc::new(Mutex::new(None));
        let mut host = world.host(FreezeBy::Host);
        host.vmms = vec![Arc::new(Between {
            kind,
            world: world.clone(),
            inner: Arc::clone(&host.vmms[0]),
            trouble: Arc::clone(&trouble),
            seats: Mutex::default(),
        })];
        let config = Config {
            measures: false,
            ..Config::default()
        };
        let kernel = host.kernels.default_kernel().await.unwrap();
        let engine = Engine::open(host, config).await.unwrap();
        world.add_image("/input/image", 1, Bytes::mib(64));
        let image = ImageRequest {
            name: "image".parse().unwrap(),
            geometry: Geometry {
                vcpus: 1,
                mem_mib: 128,
            },
            kernel,
            env: BTreeMap::new(),
            login: Login::default(),
            source: "a test".into(),
        };
        let imported = engine.import_image("/input/image".as_ref(), image).await;
        imported.unwrap();
        let request = CreateRequest {
            template: "image".into(),
            name: Some("a".parse().unwrap()),
            ..CreateRequest::default()
        };
        let id = engine.create(request).await.unwrap().record.id.clone();
        engine.pause("a").await.unwrap();
        engine.resume("a", None).await.unwrap();
        let it = Self {
            world,
            engine,
            trouble,
        };
        (it, id)
    }

    async fn act(&self, verb: &str) -> Result<(), Error> {
        let engine = &self.engine;
        match verb {
            "pause" => engine.pause("a").await.map(drop),
            "resume" => engine.resume("a", None).await.map(drop),
            "checkpoint" => engine.checkpoint("a").await.map(drop),
            "snapshot" => {
                let template = engine.snapshot("a", "taken".parse().unwrap()).await?;
                engine.remove_template(template.id.as_str()).await.map(drop)
            }
            _ => {
                for fork in engine.fork("a", 1).await? {
                    let fork = fork?.record.id.clone();
                    self.world.guest_value(&fork).unwrap();
                    engine.destroy(fork.as_str()).await?;
                }
                Ok(())
            }
        }
    }

    fn phase(&self) -> Phase {
        self.engine.inspect("a").unwrap().phase()
    }

    /// Brings the sandbox to where `verb` can begin.
    async fn ready(&self, verb: &str) {
        let ready = match (verb, self.phase()) {
            ("resume", Phase::Running) => self.act("pause").await,
            ("resume", Phase::Paused) | (_, Phase::Running) => Ok(()),
            (_, Phase::Paused) => self.act("resume").await,
            (_, Phase::Stopped) => panic!("it is stopped"),
        };
        ready.unwrap();
    }

    /// All of which can be used.
    fn generations(&self) -> Vec<u32> {
        let view = self.engine.inspect("a").unwrap();
        assert!(view.unusable.is_empty(), "{:?}", view.unusable);
        view.generations.iter().map(|it| it.number.0).collect()
    }

    async fn leave_nothing(self) {
        let Self { world, engine, .. } = self;
        for view in engine.list() {
            engine.destroy(view.record.id.as_str()).await.unwrap();
        }
        for template in engine.templates() {
            engine.remove_template(template.id.as_str()).await.unwrap();
        }
        engine.collect(false).await.unwrap();
        assert_eq!(world.in_use(), Vec::<String>::new());
        assert_eq!(world.objects(), Vec::<String>::new());
    }
}

/// Lets everything that is under way end. The clock jumps over it.
async fn settle_down() {
    tokio::time::sleep(Duration::from_secs(10_000)).await;
}

/// Goes wrong once, in every way, with every request, in a verb that is done again each time. The verb fails and has
/// changed nothing, or it has done what it was to do; and then it works.
async fn goes_wrong(kind: Kind, verb: &str) {
    let (it, id) = Scene::set(kind).await;
    let mut failures = 0;
    for request in ["probe", "pause", "save", "resume"] {
        for how in WRONGS.map(|(how, _)| how).into_iter().chain(["ends"]) {
            for after in [false, true] {
                let name = kind.dialect.name;
                let case = format!("{name}: {verb}: {request}: {how}, after: {after}");
                it.ready(verb).await;
                let (phase, generations) = (it.phase(), it.generations());
                *it.trouble.lock().unwrap() = Some(Trouble {
                    request: Some(request),
                    how,
                    after,
                    times: 1,
                });
                let done = it.act(verb).await;
                let struck = it.trouble.lock().unwrap().take().unwrap().times == 0;
                settle_down().await;
                let view = it.engine.inspect("a").unwrap();
                assert_eq!(view.record.broken, None, "{case}");
                assert!(struck || done.is_ok(), "{case}: {done:?}");
                failures += usize::from(done.is_err());
                if how == "ends" && view.phase() == Phase::Stopped {
                    assert!(struck && view.record.last_exit.is_some(), "{case}");
                    it.engine.start("a").await.expect(&case);
                } else if done.is_err() {
                    assert_eq!(view.phase(), phase, "{case}");
                }
                if done.is_err() {
                    assert_eq!(it.generations(), generations, "{case}");
                }
                let staged = it.world.in_use().into_iter();
                let staged: Vec<_> = staged.filter(|it| it.starts_with("staged")).collect();
                assert!(staged.is_empty(), "{case}: {staged:?}");
                it.ready(verb).await;
                it.act(verb).await.expect(&case);
                if it.phase() == Phase::Running {
                    it.world.guest_value(&id).expect(&case);
                }
            }
        }
    }
    // Every one of a kind of request that the verb is made of.
    assert!(failures >= 8, "{verb}: {failures}");
    for number in it.generations() {
        let to = Point::Generation(GenerationNo(number));
        it.engine.rollback("a", to, true).await.unwrap();
        it.world.guest_value(&id).unwrap();
    }
    it.leave_nothing().await;
}

async fn goes_wrong_with_all(verb: &str) {
    for kind in KINDS {
        goes_wrong(kind, verb).await;
    }
}

#[tokio::test(start_paused = true)]
async fn inv_01_inv_06_inv_09_inv_31_an_api_goes_wrong_in_a_pause() {
    goes_wrong_with_all("pause").await;
}

#[tokio::test(start_paused = true)]
async fn inv_01_inv_06_inv_31_an_api_goes_wrong_in_a_checkpoint() {
    goes_wrong_with_all("checkpoint").await;
}

#[tokio::test(start_paused = true)]
async fn inv_01_inv_06_inv_11_inv_31_an_api_goes_wrong_in_a_snapshot() {
    goes_wrong_with_all("snapshot").await;
}

#[tokio::test(start_paused = true)]
async fn inv_01_inv_06_inv_31_an_api_goes_wrong_in_a_fork() {
    goes_wrong_with_all("fork").await;
}

#[tokio::test(start_paused = true)]
async fn inv_16_inv_31_an_api_goes_wrong_in_a_resume() {
    goes_wrong_with_all("resume").await;
}

#[tokio::test(start_paused = true)]
async fn inv_02_inv_06_inv_21_an_api_that_never_works_again_holds_nobody_up() {
    for kind in KINDS {
        for how in WRONGS.map(|(how, _)| how) {
            let case = format!("{}: {how}", kind.dialect.name);
            let (it, id) = Scene::set(kind).await;
            let set = |request| {
                *it.trouble.lock().unwrap() = Some(Trouble {
                    request,
                    how,
                    after: false,
                    times: usize::MAX,
                });
            };
            // The guest runs on.
            set(None);
            for verb in ["pause", "checkpoint", "snapshot", "fork"] {
                it.act(verb).await.expect_err(&case);
                assert_eq!(it.phase(), Phase::Running, "{case}");
                assert_eq!(it.generations(), [1], "{case}");
                it.world.guest_value(&id).expect(&case);
            }
            // It stands still, and nobody is told that it runs.
            set(Some("resume"));
            it.act("checkpoint").await.expect_err(&case);
            let view = it.engine.inspect("a").unwrap();
            let why = view.record.broken.clone().expect(&case);
            assert!(why.contains("vCPUs could not be resumed"), "{case}: {why}");
            assert_eq!(it.generations(), [1], "{case}");
            set(None);
            it.engine.destroy("a").await.expect(&case);
            it.leave_nothing().await;
        }
    }
}
