//! One sandbox-world with an engine in it, and the ways to kill that engine.

use std::collections::BTreeMap;

use icebox_engine::host::Host;
use icebox_engine::id::SandboxId;
use icebox_engine::unit::{Bytes, Geometry};
use icebox_engine::{Config, CreateRequest, Engine, Error, ImageRequest, Phase};
use icebox_sim::World;

pub(crate) const IMAGE: &str = "image";

/// Runs `work` in a runtime of its own, whose clock jumps over waits. Dropping the runtime afterwards is `kill -9`:
/// whatever the engine was doing stops between two instructions.
pub(crate) fn life<T>(work: impl AsyncFnOnce() -> T) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
        .block_on(work())
}

pub(crate) async fn open(host: Host) -> Engine {
    open_with(host, Config::default()).await
}

pub(crate) async fn open_with(host: Host, config: Config) -> Engine {
    // Most tests let hours go by, and do not look at every second of them.
    let config = Config {
        measures: false,
        ..config
    };
    Engine::open(host, config).await.unwrap()
}

pub(crate) async fn import_image(world: &World, engine: &Engine) {
    world.add_image("/input/image", 1, Bytes::mib(64));
    let request = ImageRequest {
        name: IMAGE.parse().unwrap(),
        geometry: Geometry {
            vcpus: 1,
            mem_mib: 128,
        },
        kernel: engine.host().kernels.default_kernel().await.unwrap(),
        env: BTreeMap::new(),
        login: icebox_engine::manifest::v1::Login::default(),
        source: "a test".into(),
    };
    engine
        .import_image("/input/image".as_ref(), request)
        .await
        .unwrap();
}

pub(crate) fn from(template: &str) -> CreateRequest {
    CreateRequest {
        template: template.into(),
        ..CreateRequest::default()
    }
}

pub(crate) fn named(template: &str, name: &str) -> CreateRequest {
    CreateRequest {
        name: Some(name.parse().unwrap()),
        ..from(template)
    }
}

pub(crate) async fn create(engine: &Engine, name: &str) -> SandboxId {
    engine
        .create(named(IMAGE, name))
        .await
        .unwrap()
        .record
        .id
        .clone()
}

/// Brings a sandbox to where its guest runs.
pub(crate) async fn run(engine: &Engine, id: &SandboxId) -> Result<(), Error> {
    match engine.inspect(id.as_str())?.phase() {
        Phase::Running => Ok(()),
        Phase::Paused => engine.resume(id.as_str(), None).await.map(drop),
        Phase::Stopped => engine.start(id.as_str()).await.map(drop),
    }
}

/// Destroys everything and asserts that the host holds nothing.
pub(crate) async fn leave_nothing(world: &World, engine: &Engine) {
    for view in engine.list() {
        engine.destroy(view.record.id.as_str()).await.unwrap();
    }
    for template in engine.templates() {
        engine.remove_template(template.id.as_str()).await.unwrap();
    }
    engine.collect(false).await.unwrap();
    assert_eq!(world.in_use(), Vec::<String>::new(), "left on the host");
    assert_eq!(world.objects(), Vec::<String>::new(), "left in the store");
}
