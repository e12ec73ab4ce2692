//! Boots that cannot succeed: they say why, and end.

use std::fs::File;

use crate::guest::{Guest, NO_TIMER, Options, WITHOUT_TIMER};

#[tokio::test]
async fn a_disk_without_a_filesystem_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("empty");
    File::create(&disk).unwrap().set_len(16 << 20).unwrap();
    let mut guest = Guest::start(&Options {
        disk: Some(disk),
        ..Options::default()
    });
    assert!(guest.is_off().await.success());
    let console = guest.console();
    assert!(
        console
            .contains("icebox: boot failed: failed to mount the root filesystem /dev/vda (ext4)"),
        "{console}"
    );
}

#[tokio::test]
async fn inv_36_a_machine_without_a_timer_is_reset() {
    let mut guest = Guest::start(&Options {
        parameters: WITHOUT_TIMER,
        ..Options::default()
    });
    assert!(guest.is_off().await.success());
    let console = guest.console();
    assert!(console.contains(NO_TIMER), "{console}");
}

#[tokio::test]
async fn a_missing_disk_is_named() {
    let mut guest = Guest::start(&Options {
        diskless: true,
        ..Options::default()
    });
    assert!(guest.is_off().await.success());
    assert!(
        guest
            .console()
            .contains("failed to find the root device /dev/vda"),
        "{}",
        guest.console()
    );
}

#[tokio::test]
async fn a_network_that_cannot_be_set_up_is_named() {
    let mut guest = Guest::start(&Options {
        parameters: "icebox.address=nonsense",
        ..Options::default()
    });
    assert!(guest.is_off().await.success());
    assert!(
        guest.console().contains("failed to read the address"),
        "{}",
        guest.console()
    );
}
