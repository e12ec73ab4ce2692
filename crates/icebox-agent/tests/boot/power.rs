//! Guests that turn themselves off, and images that are not like others.

use std::{fs, path::Path, process::Command};

use icebox_agent_api::Token;
use icebox_agent_api::client::{AgentClient, AgentError, Command as GuestCommand, Output};

use crate::guest::{BOOT, CALL, Guest, Options, TOKEN, init, text};

/// A small image with a static shell and nothing else: no user, no library, no directory but those of the shell.
fn bare_image(directory: &Path) -> std::path::PathBuf {
    let tree = directory.join("tree");
    fs::create_dir_all(tree.join("bin")).unwrap();
    fs::copy("/bin/busybox", tree.join("bin/busybox")).unwrap();
    std::os::unix::fs::symlink("busybox", tree.join("bin/sh")).unwrap();
    let image = directory.join("bare.ext4");
    let status = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .args([&tree, &image])
        .arg("32M")
        .status()
        .unwrap();
    assert!(status.success());
    image
}

/// Runs what a guest ends in the middle of.
async fn run_last(client: &AgentClient, command: GuestCommand) -> Result<Output, AgentError> {
    let cut = tokio::time::timeout(BOOT, client.run(command)).await;
    cut.expect("the guest ends in time")
}

fn assert_clean(image: &Path) {
    let check = Command::new("e2fsck")
        .arg("-fn")
        .arg(image)
        .output()
        .unwrap();
    assert!(
        check.status.success(),
        "{}",
        String::from_utf8_lossy(&check.stdout)
    );
    let header = Command::new("dumpe2fs")
        .arg("-h")
        .arg(image)
        .output()
        .unwrap();
    let header = String::from_utf8_lossy(&header.stdout).into_owned();
    assert!(header.contains("state:         clean\n"), "{header}");
    assert!(!header.contains("needs_recovery"), "{header}");
}

#[tokio::test]
async fn an_image_with_nothing_in_it_boots_and_powers_off_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let image = bare_image(directory.path());
    let mut guest = Guest::start(&Options {
        disk: Some(image.clone()),
        ..Options::default()
    });
    let client = guest.booted().await;
    let mut init = init("bare", 1);
    init.default_user = None;
    client.init(&init, CALL).await.unwrap();
    let client = client.with_token(&Token::new(TOKEN));
    assert_eq!(text(&client, "/bin/busybox id -u; pwd").await, "0\n/");
    text(
        &client,
        "echo kept > /file; for i in 1 2 3; do /bin/busybox sleep 1000 & done",
    )
    .await;
    // As busybox does it: a signal to process 1. The connection may break before the answer.
    let command = GuestCommand::new("/bin/busybox").args(["poweroff"]);
    run_last(&client, command).await.ok();
    assert!(guest.is_off().await.success());
    assert_clean(&image);
}

#[tokio::test]
async fn a_forced_power_off_and_a_reboot_end_the_machine() {
    for how in ["poweroff", "reboot"] {
        let directory = tempfile::tempdir().unwrap();
        let mut guest = Guest::start(&Options {
            disk: Some(bare_image(directory.path())),
            ..Options::default()
        });
        let client = guest.booted().await;
        let command = GuestCommand::new("/bin/busybox").args([how, "-f"]);
        run_last(&client, command).await.ok();
        assert!(guest.is_off().await.success(), "{how}");
    }
}

#[tokio::test]
async fn a_request_over_initctl_powers_off_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let image = bare_image(directory.path());
    let mut guest = Guest::start(&Options {
        disk: Some(image.clone()),
        ..Options::default()
    });
    let client = guest.booted().await;
    // The start of what `poweroff` of sysvinit and systemd writes: magic, "change run level", '0'.
    let request = r"printf '\151\031\011\003\001\000\000\000\060\000\000\000' > /run/initctl; exec /bin/busybox sleep 1000";
    let command = GuestCommand::new("/bin/sh").args(["-c", request]);
    run_last(&client, command).await.unwrap_err();
    assert!(guest.is_off().await.success());
    assert_clean(&image);
}
