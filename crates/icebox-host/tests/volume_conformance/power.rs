//! Power cuts: what was reported done is there afterwards.
//!
//! The file system's backing file, copied at some instant, is what a disk would hold had the power gone at that instant:
//! what was not flushed is in the page cache of the file system above and not in the copy. So the test copies after every
//! step, and later mounts each copy, replays its journal, and looks for everything that was reported done before it.

use std::fs;
use std::path::PathBuf;

use icebox_engine::host::Store as _;
use icebox_engine::id::{GenerationNo, TemplateId};
use icebox_engine::layout::Object;

use crate::ground::{Disk, Ground, assert_same};
use crate::pool::Pool;

const MIB: u64 = 1 << 20;

/// What must be there from a step on.
#[derive(Clone)]
enum Fact {
    Manifest(Object, &'static [u8]),
    Gone(Object),
    File(PathBuf, &'static [u8]),
    /// A head that nobody wrote to after the step.
    Head(Disk),
    /// A chain of layers.
    Layers(Disk),
}

struct Cuts<'a> {
    ground: &'a Ground,
    facts: Vec<Fact>,
    cuts: Vec<(PathBuf, Vec<Fact>)>,
}

impl Cuts<'_> {
    /// Cuts the power after a step that reported `fact`.
    fn after(&mut self, fact: Fact) {
        // A newer manifest replaces what was known of the older one, a freeze the head.
        self.facts.retain(|known| match (known, &fact) {
            (Fact::Manifest(of, _), Fact::Manifest(now, _) | Fact::Gone(now)) => of != now,
            (Fact::Head(of), Fact::Head(now) | Fact::Layers(now)) => {
                of.head.sandbox != now.head.sandbox
            }
            _ => true,
        });
        self.facts.push(fact);
        let copy = self
            .ground
            .image
            .with_file_name(format!("cut-{}", self.cuts.len()));
        if self.ground.pool.is_some() {
            fs::create_dir(Pool::beside(&copy).parent().unwrap()).unwrap();
        }
        self.ground.cut(&copy);
        self.cuts.push((copy, self.facts.clone()));
    }
}

pub(crate) async fn inv_32_what_was_reported_done_survives_a_power_cut(
    mut ground: Ground,
) -> Ground {
    let cuts = work(&ground).await;
    // One at a time and in the same place: a copy has its original's identity, which btrfs takes for a second device of
    // the same file system, and the facts name the original's paths.
    for (number, (image, facts)) in cuts.iter().enumerate() {
        ground = ground.restart_on(image);
        check(&ground, number, facts).await;
    }
    fs::remove_file(flat(&ground)).unwrap();
    ground
}

fn flat(ground: &Ground) -> PathBuf {
    ground.layout.staging_area().join("flat")
}

/// Does a little of everything, and cuts the power after each step.
async fn work(ground: &Ground) -> Vec<(PathBuf, Vec<Fact>)> {
    let mut cuts = Cuts {
        ground,
        facts: Vec::new(),
        cuts: Vec::new(),
    };
    let mut disk = ground.disk().await;
    let sandbox = Object::Sandbox(disk.head.sandbox.clone());
    cuts.after(Fact::Head(disk.clone()));
    ground
        .store
        .commit(&sandbox, b"{\"first\":1}")
        .await
        .unwrap();
    cuts.after(Fact::Manifest(sandbox.clone(), b"{\"first\":1}"));
    ground.store.commit(&sandbox, b"{}").await.unwrap();
    cuts.after(Fact::Manifest(sandbox.clone(), b"{}"));

    ground.write(&mut disk, MIB, MIB, 0x11).await;
    ground.driver.flush(&disk.head).await.unwrap();
    cuts.after(Fact::Head(disk.clone()));
    ground.freeze(&mut disk).await;
    cuts.after(Fact::Layers(disk.clone()));
    cuts.after(Fact::Head(disk.clone()));
    let out = flat(ground);
    ground.driver.flatten(&disk.chain, &out).await.unwrap();
    let content: &'static [u8] = disk.content.clone().leak();
    cuts.after(Fact::File(out.clone(), content));

    let generation = Object::Generation(disk.head.sandbox.clone(), GenerationNo(1));
    let staging = ground.store.stage(&generation).await.unwrap();
    fs::write(staging.join("device-state"), b"state").unwrap();
    ground
        .store
        .publish(&generation, b"{\"n\":1}")
        .await
        .unwrap();
    cuts.after(Fact::Manifest(generation.clone(), b"{\"n\":1}"));
    cuts.after(Fact::File(
        ground.store.path(&generation, "device-state"),
        b"state",
    ));
    let template = Object::Template(TemplateId::random());
    ground.store.commit(&template, b"{}").await.unwrap();
    ground.store.trash(&template).await.unwrap();
    cuts.after(Fact::Gone(template));

    cuts.cuts
}

/// Looks for everything that was reported done before cut `number`, on what the cut left.
async fn check(ground: &Ground, number: usize, facts: &[Fact]) {
    let found = ground.store.load().await.unwrap();
    for fact in facts {
        match fact {
            Fact::Manifest(object, manifest) => {
                let document = found.iter().find(|document| document.object == *object);
                let bytes = document.and_then(|document| document.manifest.as_deref());
                assert_eq!(bytes, Some(*manifest), "{object} after cut {number}");
            }
            Fact::Gone(object) => {
                assert!(
                    !found.iter().any(|document| document.object == *object),
                    "{object} after cut {number}"
                );
            }
            Fact::File(path, content) => {
                let what = format!("{} after cut {number}", path.display());
                let found = fs::read(path).unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_same(&found, content, &what);
            }
            Fact::Head(disk) => {
                let heads = ground.driver.list_heads().await.unwrap();
                assert_eq!(
                    heads,
                    std::slice::from_ref(&disk.head),
                    "after cut {number}"
                );
                ground.assert_content(disk).await;
            }
            Fact::Layers(disk) => {
                let what = format!("{:?} after cut {number}", disk.chain);
                assert_same(&ground.flattened(&disk.chain).await, &disk.content, &what);
            }
        }
    }
}
