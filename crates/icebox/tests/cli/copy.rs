//! Files into sandboxes and out of them.

use std::os::unix::fs::PermissionsExt as _;

use icebox_host::guest_image::fixture;

use crate::support::{Daemon, Transcript};

#[test]
fn files_and_directories_there_and_back() {
    let daemon = Daemon::start().with_guest();
    // The "guest" shares this machine's file system: its side is a directory of its own.
    let guest = daemon.path("guest");
    std::fs::create_dir(&guest).unwrap();
    let at = |path: &str| format!("web:{}/{path}", guest.display());
    let tree = daemon.path("tree");
    std::fs::create_dir_all(tree.join("sub")).unwrap();
    std::fs::write(tree.join("sub/data"), vec![7; 3 << 20]).unwrap();
    std::os::unix::fs::symlink("sub/data", tree.join("link")).unwrap();
    let script = daemon.path("script");
    fixture::script(&script, "#!/bin/sh\necho ran\n").unwrap();

    daemon.get(&["cp", "script", &at("script")]);
    let copied = guest.join("script");
    assert_eq!(
        std::fs::read(&copied).unwrap(),
        std::fs::read(&script).unwrap()
    );
    assert_ne!(
        std::fs::metadata(&copied).unwrap().permissions().mode() & 0o111,
        0
    );
    daemon.get(&["cp", "script", &at("")]);

    daemon.get(&["cp", &at("script"), "back"]);
    assert_eq!(
        std::fs::read(daemon.path("back")).unwrap(),
        std::fs::read(&script).unwrap()
    );
    assert_ne!(
        std::fs::metadata(daemon.path("back"))
            .unwrap()
            .permissions()
            .mode()
            & 0o111,
        0
    );
    assert_eq!(
        daemon.get(&["cp", &at("script"), "-"]),
        "#!/bin/sh\necho ran"
    );

    daemon.get(&["cp", "tree", &at("tree")]);
    daemon.get(&["cp", &at("tree"), "tree-back"]);
    for copy in [guest.join("tree"), daemon.path("tree-back")] {
        assert_eq!(
            std::fs::read(copy.join("sub/data")).unwrap(),
            vec![7; 3 << 20]
        );
        assert_eq!(
            std::fs::read_link(copy.join("link")).unwrap().to_str(),
            Some("sub/data")
        );
    }
    // An existing directory receives the copy inside it.
    daemon.get(&["cp", "tree", &at("tree")]);
    assert!(guest.join("tree/tree/link").is_symlink());
}

#[test]
fn copies_that_cannot_be() {
    let daemon = Daemon::start().with_guest();
    let mut transcript = Transcript::new(&daemon);
    transcript
        .run("cp nothing-here web:/tmp/x")
        .run("cp web:/no/such/file x")
        .run("cp web:/dev/null x")
        .run("cp web:/etc/hostname /no/such/directory/x")
        .run("cp nothing:x y");
    insta::assert_snapshot!(transcript.text());
    assert!(!daemon.path("x").exists());
}
