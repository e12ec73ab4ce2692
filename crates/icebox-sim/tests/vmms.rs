//! Hosts with more than one VMM, which can do different things.

mod support;

use std::sync::Arc;

use async_trait::async_trait;
use icebox_engine::host::{
    Capabilities, HostError, LaunchPlan, Machine, ProcessIdentity, Removed, Vmm, VmmIdentity,
};
use icebox_engine::id::SandboxId;
use icebox_engine::unit::Bytes;
use icebox_engine::{CreateRequest, Error};
use icebox_sim::{FreezeBy, World};

use support::{IMAGE, create, from, import_image, leave_nothing, life, open};

/// The VMM of the simulation under another name, and without the ability to switch disks.
struct Plain {
    inner: Arc<dyn Vmm>,
    identity: VmmIdentity,
}

#[async_trait]
impl Vmm for Plain {
    fn identity(&self) -> &VmmIdentity {
        &self.identity
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            disk_switch: false,
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
        let mut host = world.host(FreezeBy::Vmm);
        let inner = Arc::clone(&host.vmms[0]);
        let identity = VmmIdentity {
            name: "plain".into(),
            ..inner.identity().clone()
        };
        host.vmms.push(Arc::new(Plain { inner, identity }));
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
        let with_plain = || {
            let mut host = world.host(FreezeBy::Host);
            let inner = Arc::clone(&host.vmms[0]);
            let identity = VmmIdentity {
                name: "plain".into(),
                ..inner.identity().clone()
            };
            host.vmms.push(Arc::new(Plain { inner, identity }));
            host
        };
        let engine = open(with_plain()).await;
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
