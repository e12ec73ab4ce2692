//! The store on a real file system.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use icebox_engine::host::{ErrorKind, Removed, Store as _};
use icebox_engine::id::{Digest, GenerationNo, LayerId, MemoryId, SandboxId, TemplateId};
use icebox_engine::layout::{LAYER_DISK, Layout, MANIFEST, Object};
use icebox_engine::unit::Bytes;
use icebox_host::store::{FORMAT, FileStore};
use sha2::Digest as _;
use tempfile::TempDir;

struct Fixture {
    directory: TempDir,
    layout: Layout,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::new(directory.path().join("data"), directory.path().join("run"));
        Self { directory, layout }
    }

    fn open(&self) -> FileStore {
        FileStore::open(self.layout.clone()).unwrap()
    }

    /// Every file and directory under the data directory, with its content.
    fn content(&self) -> Vec<(String, Vec<u8>)> {
        fn walk(directory: &Path, found: &mut Vec<(String, Vec<u8>)>) {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    found.push((path.display().to_string(), Vec::new()));
                    walk(&path, found);
                } else {
                    found.push((path.display().to_string(), fs::read(&path).unwrap()));
                }
            }
        }
        let mut found = Vec::new();
        walk(self.directory.path(), &mut found);
        found.sort();
        found
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn inv_11_a_commit_is_read_back_and_leaves_nothing_beside_it() {
    let fixture = Fixture::new();
    let sandbox = Object::Sandbox(SandboxId::random());
    {
        let store = fixture.open();
        store.commit(&sandbox, b"one").await.unwrap();
        store.commit(&sandbox, b"two").await.unwrap();
    }
    let store = fixture.open();
    let found = store.load().await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].object, sandbox);
    assert_eq!(found[0].manifest.as_deref(), Some(&b"two"[..]));
    let directory = fixture.layout.object(&sandbox);
    assert_eq!(
        fs::read_dir(&directory).unwrap().count(),
        1,
        "only the manifest"
    );
    assert_eq!(mode(&directory), 0o700);
    assert_eq!(mode(&directory.join(MANIFEST)), 0o600);
    assert_eq!(mode(fixture.layout.data()), 0o700);
}

#[tokio::test]
async fn inv_11_a_commit_that_fails_keeps_the_old_manifest() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let sandbox = Object::Sandbox(SandboxId::random());
    store.commit(&sandbox, b"one").await.unwrap();
    // Where the temporary file would go stands something that cannot be replaced by a file.
    let obstacle = fixture
        .layout
        .object(&sandbox)
        .join(format!("{MANIFEST}.new"));
    fs::create_dir(&obstacle).unwrap();
    let error = store.commit(&sandbox, b"two").await.unwrap_err();
    assert!(error.to_string().contains(MANIFEST), "{error}");
    assert_eq!(
        store.load().await.unwrap()[0].manifest.as_deref(),
        Some(&b"one"[..])
    );
    fs::remove_dir(&obstacle).unwrap();
    store.commit(&sandbox, b"two").await.unwrap();
}

#[tokio::test]
async fn commits_of_one_object_happen_in_order_also_when_nobody_waits_for_them() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let sandbox = Object::Sandbox(SandboxId::random());
    for round in 0..50_u32 {
        let abandoned = tokio::time::timeout(
            std::time::Duration::from_micros(u64::from(round) * 10),
            store.commit(&sandbox, format!("abandoned {round}").as_bytes()),
        )
        .await;
        let last = format!("last {round}");
        store.commit(&sandbox, last.as_bytes()).await.unwrap();
        let found = store.load().await.unwrap();
        assert_eq!(
            found[0].manifest.as_deref(),
            Some(last.as_bytes()),
            "round {round}, abandoned: {}",
            abandoned.is_err()
        );
    }
}

#[tokio::test]
async fn inv_09_a_generation_appears_whole_and_needs_its_sandbox() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let id = SandboxId::random();
    let generation = Object::Generation(id.clone(), GenerationNo(3));
    let staging = store.stage(&generation).await.unwrap();
    fs::write(staging.join("device-state"), b"state").unwrap();
    let error = store.publish(&generation, b"{}").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert!(
        !fixture.layout.object(&Object::Sandbox(id.clone())).exists(),
        "a sandbox that is gone must not come back as a directory"
    );

    store
        .commit(&Object::Sandbox(id.clone()), b"sandbox")
        .await
        .unwrap();
    assert!(!fixture.layout.object(&generation).exists());
    store.publish(&generation, b"{}").await.unwrap();
    assert!(!staging.exists());
    let file = store.path(&generation, "device-state");
    assert_eq!(fs::read(&file).unwrap(), b"state");
    assert_eq!(mode(&file) & 0o222, 0, "whatever its maker thought");
    let mut found = store.load().await.unwrap();
    found.sort_by_key(|document| document.object.clone());
    assert_eq!(found[1].object, generation);
    assert_eq!(found[1].manifest.as_deref(), Some(&b"{}"[..]));
}

#[tokio::test]
async fn inv_22_what_exists_is_never_overwritten() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let base = Object::Base(Digest::from_bytes([1; 32]));
    let staging = store.stage(&base).await.unwrap();
    fs::write(staging.join("image"), b"first").unwrap();
    store.publish(&base, b"1").await.unwrap();
    // A repetition after a crash: published, nothing staged.
    store.publish(&base, b"1").await.unwrap();
    // A second one of the same name.
    let staging = store.stage(&base).await.unwrap();
    fs::write(staging.join("image"), b"second").unwrap();
    let error = store.publish(&base, b"2").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
    assert_eq!(fs::read(store.path(&base, "image")).unwrap(), b"first");
    assert_eq!(store.discard(&base).await.unwrap(), Removed::Removed);
    assert_eq!(store.discard(&base).await.unwrap(), Removed::AlreadyAbsent);
    assert_eq!(fs::read(store.path(&base, MANIFEST)).unwrap(), b"1");
}

#[tokio::test]
async fn inv_22_of_two_that_race_exactly_one_is_published() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let template = Object::Template(TemplateId::random());
    store.stage(&template).await.unwrap();
    let (one, two) = tokio::join!(
        store.publish(&template, b"1"),
        store.publish(&template, b"2")
    );
    // The second finds the template published and nothing staged: to it, its own work is done.
    one.unwrap();
    two.unwrap();
    assert_eq!(fs::read(store.path(&template, MANIFEST)).unwrap(), b"1");
    assert!(store.list_staging().await.unwrap().is_empty());
}

#[tokio::test]
async fn staging_is_emptied_or_kept_as_asked_and_lists_only_what_is_ours() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let layer = Object::Layer(LayerId::random());
    let staging = store.staged(&layer).await.unwrap();
    fs::write(staging.join(LAYER_DISK), b"data").unwrap();
    assert_eq!(store.staged(&layer).await.unwrap(), staging);
    assert!(staging.join(LAYER_DISK).exists(), "staged keeps");
    store.stage(&layer).await.unwrap();
    assert!(!staging.join(LAYER_DISK).exists(), "stage empties");
    assert_eq!(mode(&staging), 0o700);

    fs::create_dir(fixture.layout.staging_area().join("lost+found")).unwrap();
    assert_eq!(store.list_staging().await.unwrap(), vec![layer.clone()]);
    let error = store
        .publish(&Object::Layer(LayerId::random()), b"{}")
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}

#[tokio::test]
async fn trash_takes_the_same_object_twice_and_is_emptied_past_what_will_not_go() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let memory = Object::Memory(MemoryId::random());
    for _ in 0..2 {
        store.stage(&memory).await.unwrap();
        store.publish(&memory, b"{}").await.unwrap();
        assert_eq!(store.trash(&memory).await.unwrap(), Removed::Removed);
        assert_eq!(store.trash(&memory).await.unwrap(), Removed::AlreadyAbsent);
        assert!(store.load().await.unwrap().is_empty());
    }
    assert_eq!(
        fs::read_dir(fixture.layout.trash_area()).unwrap().count(),
        2
    );
    store.empty_trash().await.unwrap();
    assert_eq!(
        fs::read_dir(fixture.layout.trash_area()).unwrap().count(),
        0
    );
}

#[tokio::test]
async fn inv_33_names_that_are_not_ours_are_left_alone() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let sandbox = Object::Sandbox(SandboxId::random());
    store.commit(&sandbox, b"{}").await.unwrap();
    for foreign in [
        "sandboxes/.snapshot",
        "sandboxes/lost+found",
        "layers/UPPER",
        "bases/abc",
    ] {
        fs::create_dir(fixture.layout.data().join(foreign)).unwrap();
    }
    // A file that is called like an object is none.
    fs::write(
        fixture.layout.object(&Object::Layer(LayerId::random())),
        b"not a directory",
    )
    .unwrap();
    let found = store.load().await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].object, sandbox);
}

#[tokio::test]
async fn a_directory_without_manifest_is_listed_as_such() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let sandbox = Object::Sandbox(SandboxId::random());
    fs::create_dir(fixture.layout.object(&sandbox)).unwrap();
    assert_eq!(store.load().await.unwrap()[0].manifest, None);
}

#[tokio::test]
async fn a_file_is_copied_into_staging() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let (from, to) = (
        Object::Template(TemplateId::random()),
        Object::Template(TemplateId::random()),
    );
    let staging = store.stage(&from).await.unwrap();
    fs::write(staging.join("device-state"), b"state").unwrap();
    store.publish(&from, b"{}").await.unwrap();
    let staging = store.stage(&to).await.unwrap();
    store
        .copy_into_staging(&from, "device-state", &to)
        .await
        .unwrap();
    assert_eq!(fs::read(staging.join("device-state")).unwrap(), b"state");
    let error = store
        .copy_into_staging(&from, "absent", &to)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(!staging.join("absent").exists());
}

#[test]
fn a_second_owner_is_refused_and_told_who_is_first() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let error = FileStore::open(fixture.layout.clone()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(
        error
            .to_string()
            .contains(&format!("process {}", std::process::id())),
        "{error}"
    );
    assert!(error.hint_text().is_some());
    drop(store);
    fixture.open();
}

#[test]
fn inv_44_a_newer_layout_is_refused_and_left_as_it_was() {
    let fixture = Fixture::new();
    drop(fixture.open());
    fs::remove_file(fixture.layout.lock_file()).unwrap();
    fs::write(
        fixture.layout.format_file(),
        format!(
            r#"{{"format":{},"writer":"icebox 9.9","more":[1]}}"#,
            FORMAT + 1
        ),
    )
    .unwrap();
    let before = fixture.content();
    let error = FileStore::open(fixture.layout.clone()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let text = error.to_string();
    for part in [
        format!("version {}", FORMAT + 1),
        "icebox 9.9".to_owned(),
        format!("up to {FORMAT}"),
    ] {
        assert!(text.contains(&part), "{text}");
    }
    assert_eq!(fixture.content(), before);
}

#[test]
fn a_damaged_or_foreign_directory_is_refused_and_left_as_it_was() {
    for format in [Some("{"), Some("{\"format\":0}"), Some(""), None] {
        let fixture = Fixture::new();
        fs::create_dir_all(fixture.layout.data().join("sandboxes")).unwrap();
        if let Some(format) = format {
            fs::write(fixture.layout.format_file(), format).unwrap();
        }
        let before = fixture.content();
        let error = FileStore::open(fixture.layout.clone()).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{format:?}: {error}");
        assert!(error.hint_text().is_some());
        assert_eq!(fixture.content(), before, "{format:?}");
    }
}

#[tokio::test]
async fn inv_28_the_room_is_that_of_the_file_system_below() {
    let fixture = Fixture::new();
    let data = fixture.layout.data().to_owned();
    let space = fixture.open().space().await.unwrap();
    let stat = rustix::fs::statvfs(&data).unwrap();
    assert_eq!(space.total, Bytes(stat.f_blocks * stat.f_frsize));
    assert!(Bytes(0) < space.available && space.available <= space.total);
    assert!(
        space.place.contains(data.to_str().unwrap()),
        "{}",
        space.place
    );
}

#[tokio::test]
async fn a_file_is_moved_into_staging_and_never_over_another() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let base = Object::Base(Digest::from_bytes([1; 32]));
    let staging = store.stage(&base).await.unwrap();
    let built = fixture.layout.data().join("built");
    fs::write(&built, b"image").unwrap();
    store
        .move_into_staging(&built, &base, "image")
        .await
        .unwrap();
    assert_eq!(fs::read(staging.join("image")).unwrap(), b"image");
    assert!(!built.exists());
    fs::write(&built, b"another").unwrap();
    let error = store
        .move_into_staging(&built, &base, "image")
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert_eq!(fs::read(&built).unwrap(), b"another");
}

#[tokio::test]
async fn inv_27_sizes_are_allocated_bytes_and_digests_read_holes_as_zeros() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let memory = Object::Memory(MemoryId::random());
    let staging = store.stage(&memory).await.unwrap();
    let sparse = fs::File::create(staging.join("base")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    let expected = {
        let mut plain = vec![0; 64 << 20];
        plain[1 << 20..][..3].copy_from_slice(b"ice");
        Digest::from_bytes(sha2::Sha256::digest(&plain).into())
    };
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"ice", 1 << 20).unwrap();
    store.publish(&memory, b"{}").await.unwrap();
    let allocated = store.allocated(&memory).await.unwrap();
    assert!(
        (Bytes(1)..Bytes::mib(1)).contains(&allocated),
        "{allocated}"
    );
    assert_eq!(
        store.digest(&store.path(&memory, "base")).await.unwrap(),
        expected
    );
}
