//! Names and metadata of files.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink},
    path::Path,
};

use connectrpc::{ErrorCode, client::CallOptions};
use icebox_agent_api::{
    client::FilesystemService,
    proto::filesystem::{
        CreateWatcherRequest, EntryInfo, EventType, FileType, GetWatcherEventsRequest,
        ListDirRequest, MakeDirRequest, MoveRequest, RemoveRequest, RemoveWatcherRequest,
        StatRequest, WatchDirRequest,
    },
};

use crate::support::Server;

async fn stat(client: &FilesystemService, path: &Path) -> Result<EntryInfo, ErrorCode> {
    let request = StatRequest {
        path: path.to_str().unwrap().into(),
        ..Default::default()
    };
    let response = client
        .stat(request)
        .await
        .map_err(|error| error.code)?
        .into_owned();
    Ok(Option::from(response.entry).unwrap())
}

async fn list(
    client: &FilesystemService,
    path: &Path,
    depth: u32,
) -> Result<Vec<String>, ErrorCode> {
    let request = ListDirRequest {
        path: path.to_str().unwrap().into(),
        depth,
        ..Default::default()
    };
    let response = client
        .list_dir(request)
        .await
        .map_err(|error| error.code)?
        .into_owned();
    Ok(response
        .entries
        .into_iter()
        .map(|entry| entry.path)
        .collect())
}

async fn make_dir(client: &FilesystemService, path: &Path) -> Result<EntryInfo, ErrorCode> {
    let request = MakeDirRequest {
        path: path.to_str().unwrap().into(),
        ..Default::default()
    };
    let response = client
        .make_dir(request)
        .await
        .map_err(|error| error.code)?
        .into_owned();
    Ok(Option::from(response.entry).unwrap())
}

async fn rename(client: &FilesystemService, from: &Path, to: &Path) -> Result<String, ErrorCode> {
    let request = MoveRequest {
        source: from.to_str().unwrap().into(),
        destination: to.to_str().unwrap().into(),
        ..Default::default()
    };
    let response = client
        .r#move(request)
        .await
        .map_err(|error| error.code)?
        .into_owned();
    Ok(response.entry.path.clone())
}

async fn remove(client: &FilesystemService, path: &Path) -> Result<(), ErrorCode> {
    let request = RemoveRequest {
        path: path.to_str().unwrap().into(),
        ..Default::default()
    };
    client
        .remove(request)
        .await
        .map(|_| ())
        .map_err(|error| error.code)
}

#[tokio::test]
async fn entries_are_described() {
    let server = Server::start();
    let client = server.client().filesystem();
    let path = server.directory.path().join("f");
    fs::write(&path, "12345").unwrap();
    let entry = stat(&client, &path).await.unwrap();
    assert_eq!(
        (entry.name.as_str(), entry.path.as_str()),
        ("f", path.to_str().unwrap())
    );
    assert_eq!(
        (entry.size, entry.mode, entry.permissions.as_str()),
        (5, 0o644, "-rw-r--r--")
    );
    assert_eq!(
        (entry.owner.as_str(), entry.group.as_str()),
        ("root", "root")
    );
    assert_eq!(entry.r#type, FileType::FILE_TYPE_FILE);
    assert!(entry.modified_time.seconds > 1_700_000_000);
    assert_eq!(
        stat(&client, &server.directory.path().join("none")).await,
        Err(ErrorCode::NotFound)
    );
}

#[tokio::test]
async fn directories_are_made_with_their_parents_once() {
    let server = Server::start();
    let client = server.client().with_user("daemon").filesystem();
    let path = server.directory.path().join("a/b");
    let entry = make_dir(&client, &path).await.unwrap();
    assert_eq!(
        (
            entry.r#type == FileType::FILE_TYPE_DIRECTORY,
            entry.owner.as_str()
        ),
        (true, "daemon")
    );
    assert_eq!(
        make_dir(&client, &path).await,
        Err(ErrorCode::AlreadyExists)
    );
    let file = path.join("f");
    fs::write(&file, "").unwrap();
    assert_eq!(
        make_dir(&client, &file).await,
        Err(ErrorCode::InvalidArgument)
    );
    assert_eq!(
        make_dir(&client, &file.join("below")).await,
        Err(ErrorCode::InvalidArgument)
    );
}

#[tokio::test]
async fn links_lead_changes_no_further_than_their_users_rights() {
    let server = Server::start();
    let directory = server.directory.path();
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();
    let (theirs, roots) = (directory.join("theirs"), directory.join("roots"));
    fs::create_dir(&theirs).unwrap();
    chown(&theirs, Some(1), Some(1)).unwrap();
    fs::create_dir_all(roots.join("inner")).unwrap();
    fs::write(roots.join("precious"), "precious").unwrap();
    let link = theirs.join("link");
    symlink(&roots, &link).unwrap();
    let client = server.client().with_user("daemon").filesystem();
    let denied = Some(ErrorCode::PermissionDenied);
    assert_eq!(make_dir(&client, &link.join("a/b")).await.err(), denied);
    for path in ["precious", "inner"] {
        let path = link.join(path);
        assert_eq!(remove(&client, &path).await.err(), denied);
        assert_eq!(
            rename(&client, &path, &theirs.join("got")).await.err(),
            denied
        );
    }
    fs::write(theirs.join("bad"), "bad").unwrap();
    assert_eq!(
        rename(&client, &theirs.join("bad"), &link.join("precious"))
            .await
            .err(),
        denied
    );
    assert_eq!(
        fs::read_to_string(roots.join("precious")).unwrap(),
        "precious"
    );
    assert_eq!(fs::read_dir(&roots).unwrap().count(), 2);
    // The link itself is theirs to move and to remove.
    let moved = theirs.join("made/moved");
    rename(&client, &link, &moved).await.unwrap();
    assert_eq!(fs::metadata(theirs.join("made")).unwrap().uid(), 1);
    remove(&client, &moved).await.unwrap();
    assert_eq!(fs::read_dir(&roots).unwrap().count(), 2);
    // As it is spelled, every path of the guest is reached.
    make_dir(&client, &roots.join("a/b")).await.unwrap();
    remove(&client, &roots.join("a")).await.unwrap();
}

#[tokio::test]
async fn lists_are_in_order_and_as_deep_as_asked() {
    let server = Server::start();
    let client = server.client().filesystem();
    let root = server.directory.path().join("root");
    for directory in ["b/inner", "a", "c"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::write(root.join("b/inner/f"), "").unwrap();
    symlink(&root, root.join("a/loop")).unwrap();
    let expect = |names: &[&str]| {
        names
            .iter()
            .map(|name| root.join(name).display().to_string())
            .collect::<Vec<_>>()
    };
    let flat = expect(&["a", "b", "c"]);
    assert_eq!(list(&client, &root, 0).await.unwrap(), flat);
    assert_eq!(list(&client, &root, 1).await.unwrap(), flat);
    let deep = expect(&["a", "a/loop", "b", "b/inner", "b/inner/f", "c"]);
    assert_eq!(list(&client, &root, 10).await.unwrap(), deep);

    let link = server.directory.path().join("link");
    symlink(&root, &link).unwrap();
    assert_eq!(
        list(&client, &link, 1).await.unwrap()[0],
        link.join("a").display().to_string()
    );
    assert_eq!(
        list(&client, &root.join("none"), 1).await,
        Err(ErrorCode::NotFound)
    );
    assert_eq!(
        list(&client, &root.join("b/inner/f"), 1).await,
        Err(ErrorCode::InvalidArgument)
    );
}

#[tokio::test]
async fn moves_make_parents_and_removes_take_trees() {
    let server = Server::start();
    let client = server.client().filesystem();
    let base = server.directory.path();
    fs::create_dir_all(base.join("a/b/c")).unwrap();
    let (from, to) = (base.join("a"), base.join("x/y"));
    assert_eq!(
        rename(&client, &from, &to).await.unwrap(),
        to.display().to_string()
    );
    assert!(to.join("b/c").is_dir() && !from.exists());
    assert_eq!(rename(&client, &from, &to).await, Err(ErrorCode::NotFound));

    fs::create_dir(base.join("kept")).unwrap();
    symlink(base.join("kept"), to.join("link")).unwrap();
    remove(&client, &base.join("x")).await.unwrap();
    assert!(!base.join("x").exists() && base.join("kept").exists());
    remove(&client, &base.join("x")).await.unwrap();
    assert_eq!(
        remove(&client, Path::new("/x/..")).await,
        Err(ErrorCode::InvalidArgument)
    );
}

#[tokio::test]
async fn a_poll_right_after_a_change_tells_it() {
    let server = Server::start();
    let client = server.client().filesystem();
    let root = server.directory.path().join("root");
    fs::create_dir(&root).unwrap();
    let request = CreateWatcherRequest {
        path: root.to_str().unwrap().into(),
        recursive: true,
        include_entry: true,
        ..Default::default()
    };
    let watcher_id = client
        .create_watcher(request)
        .await
        .unwrap()
        .into_owned()
        .watcher_id;
    let poll = async || {
        let request = GetWatcherEventsRequest {
            watcher_id: watcher_id.clone(),
            ..Default::default()
        };
        client
            .get_watcher_events(request)
            .await
            .map_err(|error| error.code)
            .map(|response| response.into_owned().events)
    };
    fs::create_dir(root.join("d")).unwrap();
    let told = poll().await.unwrap();
    assert_eq!((told.len(), told[0].name.as_str()), (1, "d"));
    assert_eq!(told[0].entry.path, root.join("d").to_str().unwrap());
    assert_eq!(told[0].entry.r#type, FileType::FILE_TYPE_DIRECTORY);
    fs::write(root.join("d/f"), "x").unwrap();
    let told: Vec<_> = poll()
        .await
        .unwrap()
        .into_iter()
        .map(|event| (event.name, event.r#type))
        .collect();
    let created = ("d/f".to_owned(), EventType::EVENT_TYPE_CREATE.into());
    let written = ("d/f".to_owned(), EventType::EVENT_TYPE_WRITE.into());
    assert_eq!(told, [created, written]);
    assert_eq!(poll().await.unwrap(), []);

    let remove = || RemoveWatcherRequest {
        watcher_id: watcher_id.clone(),
        ..Default::default()
    };
    client.remove_watcher(remove()).await.unwrap();
    assert_eq!(poll().await, Err(ErrorCode::NotFound));
    assert_eq!(
        client.remove_watcher(remove()).await.unwrap_err().code,
        ErrorCode::NotFound
    );
}

#[tokio::test]
async fn a_stream_of_changes_begins_with_a_start_and_ends_with_its_reader() {
    use icebox_agent_api::proto::filesystem::watch_dir_response::Event;
    let server = Server::start();
    let client = server.client().filesystem();
    let root = server.directory.path().join("root");
    fs::create_dir(&root).unwrap();
    let watch = |path: &Path| WatchDirRequest {
        path: path.to_str().unwrap().into(),
        ..Default::default()
    };
    let options = CallOptions::default().with_header("keepalive-ping-interval", "1");
    let mut stream = client
        .watch_dir_with_options(watch(&root), options)
        .await
        .unwrap();
    let mut next = async || {
        stream
            .message()
            .await
            .unwrap()
            .unwrap()
            .to_owned_message()
            .event
            .unwrap()
    };
    assert!(matches!(next().await, Event::Start(_)));
    fs::write(root.join("f"), "").unwrap();
    let event = loop {
        match next().await {
            Event::Filesystem(event) => break event,
            Event::Keepalive(_) => {}
            Event::Start(_) => panic!("it starts twice"),
        }
    };
    assert_eq!(
        (event.name.as_str(), event.r#type),
        ("f", EventType::EVENT_TYPE_CREATE.into())
    );
    assert!(!event.entry.is_set());
    assert!(matches!(next().await, Event::Keepalive(_)));
    drop(stream);

    for (path, code) in [
        ("none", ErrorCode::NotFound),
        ("f", ErrorCode::InvalidArgument),
    ] {
        let mut stream = client.watch_dir(watch(&root.join(path))).await.unwrap();
        assert_eq!(stream.message().await.unwrap_err().code, code);
    }
    // The descriptor of the watch is given back when the connection is gone.
    let watches = || {
        let fds = fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap();
        fds.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok())
            .filter(|target| target.ends_with("anon_inode:inotify"))
            .count()
    };
    while watches() > 0 {
        tokio::task::yield_now().await;
    }
}
