//! Hosts with more than one VMM, which can do different things.

use std::sync::Arc;

use async_trait::async_trait;
use icebox_engine::host::{
    Capabilities, CpuFeatures, Host, HostError, LaunchPlan, Machine, ProcessIdentity, Removed, Vmm,
    VmmIdentity,
};
use icebox_engine::id::{Digest, GenerationNo, SandboxId};
use icebox_engine::layout::Object;
use icebox_engine::manifest::{self, v1};
use icebox_engine::unit::Bytes;
use icebox_engine::{CreateRequest, Engine, Error, Phase};
use icebox_sim::{FreezeBy, World};

use crate::support::{IMAGE, create, from, import_image, leave_nothing, life, open};

/// The VMM of the simulation under another name, without the ability to switch disks. Its guests keep the CPU that they
/// were booted with.
struct Plain {
    inner: Arc<dyn Vmm>,
    identity: VmmIdentity,
}

/// A host that has that one, too.
fn with_plain(world: &World, freeze: FreezeBy) -> Host {
    let mut host = world.host(freeze);
    let inner = Arc::clone(&host.vmms[0]);
    let identity = VmmIdentity {
        name: "plain".into(),
        ..inner.identity().clone()
    };
    host.vmms.push(Arc::new(Plain { inner, identity }));
    host
}

#[async_trait]
impl Vmm for Plain {
    fn identity(&self) -> &VmmIdentity {
        &self.identity
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            disk_switch: false,
            keeps_cpu_features: true,
            max_vcpus: 2,
            ..self.inner.capabilities()
        }
    }

    async fn launch(&self, plan: LaunchPlan) -> Result<Arc<dyn Machine>, HostError> {
        self.inner.launch(plan).await
    }

    async fn adopt(
        &self,
        sandbox: &SandboxId,
        recorded: Option<&ProcessIdentity>,
    ) -> Result<Option<Arc<dyn Machine>>, HostError> {
        self.inner.adopt(sandbox, recorded).await
    }

    async fn kill(
        &self,
        sandbox: &SandboxId,
        recorded: Option<&ProcessIdentity>,
    ) -> Result<Removed, HostError> {
        self.inner.kill(sandbox, recorded).await
    }
}

#[test]
fn inv_26_inv_44_what_a_vmm_cannot_do_is_refused_with_what_to_do() {
    life(async || {
        let world = World::default();
        let host = with_plain(&world, FreezeBy::Vmm);
        let by_vmm = host.volumes[0].name().to_owned();
        let by_host = host.volumes[1].name().to_owned();
        let engine = open(host).await;
        import_image(&world, &engine).await;
        let on_plain = |template: &str, volume_driver: Option<&String>| CreateRequest {
            vmm: Some("plain".into()),
            volume_driver: volume_driver.cloned(),
            ..from(template)
        };

        // The default driver is one that goes with the VMM.
        let view = engine.create(on_plain(IMAGE, None)).await.unwrap();
        assert_eq!(view.record.spec.vmm, "plain");
        assert_eq!(view.record.spec.volume_driver, by_host);
        let id = view.record.id.clone();
        engine.pause(id.as_str()).await.unwrap();
        engine.resume(id.as_str(), None).await.unwrap();
        let view = engine.create(from(IMAGE)).await.unwrap();
        assert_eq!(view.record.spec.volume_driver, by_vmm);

        let error = engine.create(on_plain(IMAGE, Some(&by_vmm))).await;
        let Err(Error::Invalid { message, hint }) = error else {
            panic!("{error:?}");
        };
        assert!(message.contains("plain cannot switch disks"), "{message}");
        assert!(hint.contains(&by_host), "{hint}");

        let crowded = CreateRequest {
            vcpus: Some(3),
            ..on_plain(IMAGE, None)
        };
        let error = engine.create(crowded).await.unwrap_err();
        assert!(error.to_string().contains("3 vCPUs"), "{error}");

        // What one VMM saved is another's neither to restore nor to guess at.
        create(&engine, "source").await;
        engine
            .snapshot("source", "warm".parse().unwrap())
            .await
            .unwrap();
        let error = engine.create(on_plain("warm", Some(&by_vmm))).await;
        assert!(matches!(error, Err(Error::Invalid { .. })), "{error:?}");
        engine
            .snapshot(id.as_str(), "plainly".parse().unwrap())
            .await
            .unwrap();
        let on_other = CreateRequest {
            vmm: Some("sim".into()),
            ..from("plainly")
        };
        let error = engine.create(on_other).await;
        let Err(Error::Incompatible {
            field,
            captured,
            here,
            ..
        }) = error
        else {
            panic!("{error:?}");
        };
        assert_eq!((field, &*captured, &*here), ("VMM", "plain", "sim"));
        let view = engine.create(from("plainly")).await.unwrap();
        assert_eq!(view.record.spec.vmm, "plain");

        leave_nothing(&world, &engine).await;
    });
}

#[test]
fn inv_44_the_disk_of_a_snapshot_boots_without_the_vmm_that_made_it_if_that_is_asked_for() {
    let world = World::default();
    life(async || {
        let engine = open(with_plain(&world, FreezeBy::Host)).await;
        import_image(&world, &engine).await;
        let on_plain = CreateRequest {
            vmm: Some("plain".into()),
            ..from(IMAGE)
        };
        let source = engine.create(on_plain).await.unwrap().record.id.clone();
        engine
            .snapshot(source.as_str(), "warm".parse().unwrap())
            .await
            .unwrap();
        engine.destroy(source.as_str()).await.unwrap();
    });
    life(async || {
        // The VMM is gone: nothing else is taken in its place, unless that is asked for.
        let engine = open(world.host(FreezeBy::Host)).await;
        let error = engine.create(from("warm")).await.unwrap_err();
        let Error::Incompatible {
            what,
            field,
            captured,
            here,
        } = &error
        else {
            panic!("{error:?}");
        };
        assert_eq!((&**what, *field), ("template warm", "VMM"));
        assert_eq!((&**captured, &**here), ("plain", "sim"));
        let hint = error.hint().unwrap();
        assert!(hint.contains("create --cold"), "{hint}");
        let cold = |vcpus| CreateRequest {
            cold: true,
            vcpus,
            ..from("warm")
        };
        let view = engine.create(cold(Some(3))).await.unwrap();
        let record = &view.record;
        assert_eq!(record.spec.vmm, "sim");
        assert_eq!(record.spec.geometry.vcpus, 3);
        assert_eq!(record.restored_from, None);
        assert_eq!(view.layers, 1);
        let larger = CreateRequest {
            disk_size: Some(Bytes(2 * record.spec.disk_size.0)),
            ..cold(None)
        };
        let error = engine.create(larger).await.unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
        let id = record.id.clone();
        engine.pause(id.as_str()).await.unwrap();
        engine.resume(id.as_str(), None).await.unwrap();
        leave_nothing(&world, &engine).await;
    });
}

/// What a refusal to restore names: the property, what was captured, and what is here.
fn differs(error: Error) -> (&'static str, String, String) {
    assert!(error.hint().unwrap().contains("start"), "{error}");
    match error {
        Error::Incompatible {
            field,
            captured,
            here,
            ..
        } => (field, captured, here),
        other => panic!("{other:?}"),
    }
}

/// The CPU features that the record says the sandbox's guest has.
fn features_of(engine: &Engine, name: &str) -> String {
    let view = engine.inspect(name).unwrap();
    let machine = view.record.machine.as_ref().unwrap();
    machine.vmm.cpu_features.to_string()
}

#[test]
fn inv_44_a_guest_goes_on_where_all_its_cpu_features_are_and_nowhere_else() {
    for (vmm, keeps) in [("sim", false), ("plain", true)] {
        let world = World::default();
        let here = async |features: &str| {
            world.offer_cpu_features(features);
            open(with_plain(&world, FreezeBy::Host)).await
        };
        life(async || {
            let engine = here("aes avx").await;
            import_image(&world, &engine).await;
            let request = CreateRequest {
                vmm: Some(vmm.into()),
                name: Some("a".parse().unwrap()),
                ..from(IMAGE)
            };
            engine.create(request).await.unwrap();
            engine.snapshot("a", "warm".parse().unwrap()).await.unwrap();
            engine.pause("a").await.unwrap();
        });
        life(async || {
            let engine = here("aes").await;
            let lacking = ("CPU features", "avx".into(), "none of these".into());
            let error = engine.resume("a", None).await.unwrap_err();
            assert_eq!(differs(error), lacking);
            let error = engine.create(from("warm")).await.unwrap_err();
            assert_eq!(differs(error), lacking);
            let forks = engine.fork("a", 1).await.unwrap();
            let error = forks.into_iter().find_map(Result::err).unwrap();
            assert_eq!(differs(error), lacking);
            assert_eq!(engine.list().len(), 1);
            assert_eq!(engine.inspect("a").unwrap().phase(), Phase::Paused);
        });
        life(async || {
            let engine = here("aes avx sha_ni").await;
            engine.resume("a", None).await.unwrap();
            let seen = if keeps { "aes avx" } else { "aes avx sha_ni" };
            assert_eq!(features_of(&engine, "a"), seen);
            engine.pause("a").await.unwrap();
        });
        life(async || {
            let engine = here("aes avx").await;
            let resumed = engine.resume("a", None).await;
            if keeps {
                resumed.unwrap();
            } else {
                let lacking = ("CPU features", "sha_ni".into(), "none of these".into());
                assert_eq!(differs(resumed.unwrap_err()), lacking);
            }
            engine.stop("a").await.unwrap();
            engine.start("a").await.unwrap();
            assert_eq!(features_of(&engine, "a"), "aes avx");
            leave_nothing(&world, &engine).await;
        });
    }
}

#[test]
fn inv_44_a_guest_that_runs_on_is_recorded_as_it_was_started() {
    let world = World::default();
    world.offer_cpu_features("aes avx");
    life(async || {
        let engine = open(world.host(FreezeBy::Vmm)).await;
        import_image(&world, &engine).await;
        create(&engine, "a").await;
    });
    world.upgrade_vmm("2.0");
    world.offer_cpu_features("aes sha_ni");
    life(async || {
        let engine = open(world.host(FreezeBy::Vmm)).await;
        assert_eq!(engine.inspect("a").unwrap().phase(), Phase::Running);
        engine.pause("a").await.unwrap();
        let error = engine.resume("a", None).await.unwrap_err();
        assert_eq!(differs(error), ("VMM version", "1.0".into(), "2.0".into()));
        assert_eq!(features_of(&engine, "a"), "aes avx");
        engine.stop("a").await.unwrap();
        engine.start("a").await.unwrap();
        assert_eq!(features_of(&engine, "a"), "aes sha_ni");
        leave_nothing(&world, &engine).await;
    });
}

/// Changes what a sandbox's first generation says of the guest's machine, while no daemon runs.
async fn edit(world: &World, id: &SandboxId, change: impl FnOnce(&mut v1::Machine)) {
    let object = Object::Generation(id.clone(), GenerationNo(1));
    let stored = world.host(FreezeBy::Vmm).store.load().await.unwrap();
    let found = stored.into_iter().find(|it| it.object == object).unwrap();
    let (revision, mut generation) =
        manifest::decode::<v1::Generation>(&object, found.manifest.as_deref()).unwrap();
    change(&mut generation.capture.machine);
    world.overwrite_manifest(&object, &manifest::encode(revision, &generation));
}

#[test]
fn inv_44_another_kernel_is_refused_and_what_was_not_recorded_is_not_asked_for() {
    let world = World::default();
    world.offer_cpu_features("aes avx");
    let id = life(async || {
        let engine = open(world.host(FreezeBy::Vmm)).await;
        import_image(&world, &engine).await;
        let id = create(&engine, "a").await;
        engine.pause("a").await.unwrap();
        id
    });
    let other = Digest::from_bytes([9; 32]);
    let kernel = life(async || {
        let mut kernel = None;
        edit(&world, &id, |machine| {
            kernel = Some(std::mem::replace(&mut machine.kernel, other.clone()));
        })
        .await;
        kernel.unwrap()
    });
    life(async || {
        let engine = open(world.host(FreezeBy::Vmm)).await;
        let error = engine.resume("a", None).await.unwrap_err();
        let expected = ("kernel", other.to_string(), kernel.to_string());
        assert_eq!(differs(error), expected);
    });
    life(async || {
        edit(&world, &id, |machine| {
            machine.kernel = kernel;
            machine.vmm.cpu_features = CpuFeatures::default();
        })
        .await;
    });
    world.offer_cpu_features("aes");
    life(async || {
        let engine = open(world.host(FreezeBy::Vmm)).await;
        engine.resume("a", None).await.unwrap();
        assert_eq!(features_of(&engine, "a"), "aes");
        leave_nothing(&world, &engine).await;
    });
}
