//! A disk that is a block device of the host, as some volume drivers' are.

use std::fs;
use std::path::{Path, PathBuf};

use icebox_engine::host::{BlockDevice, LaunchPlan, Vmm as _};
use icebox_host::guest_image::fixture;
use icebox_host::skip::skip;

use crate::lab::{Lab, output};

/// A loop device on a copy of the Debian image, gone at the end.
struct Device(PathBuf);

impl Device {
    fn over(image: &Path) -> Self {
        let node = output(
            "losetup",
            &["--find", "--show", &image.display().to_string()],
        );
        assert!(node.starts_with("/dev/loop"), "no loop device: {node}");
        Self(node.trim_end().into())
    }

    fn under(&self, mut plan: LaunchPlan) -> LaunchPlan {
        plan.disk = BlockDevice::Raw {
            path: self.0.clone(),
        };
        plan
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        output("losetup", &["--detach", &self.0.display().to_string()]);
    }
}

fn copy_of(from: &Path, to: &Path) {
    let (from, to) = (fs::File::open(from), fs::File::create_new(to));
    icebox_host::fs::sparse_copy(&from.unwrap(), &to.unwrap()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn inv_03_a_guest_on_a_block_device_comes_back_with_what_it_wrote() {
    const TEST: &str = "devices::inv_03_a_guest_on_a_block_device_comes_back_with_what_it_wrote";
    if !Path::new("/dev/loop-control").exists() {
        return skip(TEST, "there are no loop devices here (/dev/loop-control)");
    }
    let lab = Lab::open().await;
    let mut guest = lab.guest().await;
    let image = lab.path().join("image");
    copy_of(&fixture::debian_image().unwrap(), &image);
    let device = Device::over(&image);

    let machine = guest.boot_as(device.under(guest.boot_plan().await)).await;
    guest
        .sh("echo one > /root/one && sync /root/one && echo two > /root/two")
        .await;
    machine.pause_vcpus().await.unwrap();
    // What the guest synced is in the file under the device. A copy is looked at: replaying its journal writes.
    let copy = lab.path().join("copy");
    copy_of(&image, &copy);
    output(
        "e2fsck",
        &["-fy", "-E", "journal_only", copy.to_str().unwrap()],
    );
    let one = output("debugfs", &["-R", "cat /root/one", copy.to_str().unwrap()]);
    assert_eq!(one, "one\n");
    guest.save(&*machine).await;
    lab.qemu
        .kill(&guest.id, Some(&machine.process()))
        .await
        .unwrap();

    let machine = lab
        .qemu
        .launch(device.under(guest.restore_plan().await))
        .await
        .unwrap();
    machine.resume_vcpus().await.unwrap();
    guest.ready(&*machine).await.unwrap();
    assert_eq!(guest.sh("sync; cat /root/one /root/two").await, "one\ntwo");
    lab.qemu
        .kill(&guest.id, Some(&machine.process()))
        .await
        .unwrap();
    drop(device);
    lab.close().await;
}
