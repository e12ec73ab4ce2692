//! Users and groups, read from `/etc/passwd` and `/etc/group`.
//!
//! Own parsing, because the C library's goes through modules that a static binary cannot count on. Files are read
//! anew each time: they change under us, and a look-up is rare.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use rustix::{
    process::{Gid, Uid},
    thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};

/// Someone who can own processes and files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) home: PathBuf,
}

/// There is no such user.
#[derive(Debug, thiserror::Error)]
#[error("invalid username: '{0}'")]
pub(crate) struct UnknownUser(pub(crate) String);

impl User {
    /// Finds a user by name. `root` exists even where `/etc/passwd` does not.
    pub(crate) fn find(name: &str) -> Result<Self, UnknownUser> {
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        match parse_passwd(&passwd).find(|user| user.name == name) {
            Some(user) => Ok(user),
            None if name == "root" => Ok(Self {
                name: name.to_owned(),
                uid: 0,
                gid: 0,
                home: PathBuf::from("/root"),
            }),
            None => Err(UnknownUser(name.to_owned())),
        }
    }

    /// The groups of the user, the primary one included.
    pub(crate) fn groups(&self) -> Vec<u32> {
        let groups = fs::read_to_string("/etc/group").unwrap_or_default();
        let mut ids: Vec<u32> = std::iter::once(self.gid)
            .chain(
                parse_group(&groups)
                    .filter(|(_, _, members)| members.contains(&self.name.as_str()))
                    .map(|g| g.1),
            )
            .collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Does `work` with this user's rights to files and no others, on a thread that ends with it: rights are a thread's,
    /// and so cannot be left behind on one that others use. Blocks. Needs root, unless the user is who we are.
    pub(crate) fn act<T: Send>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send,
    ) -> io::Result<T> {
        std::thread::scope(|scope| {
            let acting = std::thread::Builder::new()
                .name(format!("as {}", self.uid))
                .spawn_scoped(scope, || {
                    self.become_on_this_thread()?;
                    work()
                })?;
            acting
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the work panicked")))
        })
    }

    /// The effective ids alone: with the real ones, the user's own processes could reach for ours.
    fn become_on_this_thread(&self) -> io::Result<()> {
        let groups: Vec<Gid> = self.groups().into_iter().map(Gid::from_raw).collect();
        set_thread_groups(&groups)?;
        set_thread_res_gid(Gid::ROOT, Gid::from_raw(self.gid), Gid::ROOT)?;
        // Not being root any more takes the capabilities to pass over permissions.
        set_thread_res_uid(Uid::ROOT, Uid::from_raw(self.uid), Uid::ROOT)?;
        Ok(())
    }
}

/// Names of users and groups by number, for listing files.
pub(crate) struct Names {
    users: HashMap<u32, String>,
    groups: HashMap<u32, String>,
}

impl Names {
    pub(crate) fn read() -> Self {
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let group = fs::read_to_string("/etc/group").unwrap_or_default();
        // The first entry of a number wins, as it does for the C library.
        let (mut users, mut groups) = (HashMap::new(), HashMap::new());
        for user in parse_passwd(&passwd) {
            users.entry(user.uid).or_insert(user.name);
        }
        for (name, gid, _) in parse_group(&group) {
            groups.entry(gid).or_insert_with(|| name.to_owned());
        }
        Self { users, groups }
    }

    /// The user's name, or the number where it has none.
    pub(crate) fn user(&self, uid: u32) -> String {
        self.users
            .get(&uid)
            .cloned()
            .unwrap_or_else(|| uid.to_string())
    }

    /// The group's name, or the number where it has none.
    pub(crate) fn group(&self, gid: u32) -> String {
        self.groups
            .get(&gid)
            .cloned()
            .unwrap_or_else(|| gid.to_string())
    }
}

/// Lines of passwd(5): `name:password:uid:gid:comment:home:shell`. Malformed ones are passed over.
fn parse_passwd(text: &str) -> impl Iterator<Item = User> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields
            .nth(1)
            .map(Path::new)
            .filter(|home| home.is_absolute())
            .unwrap_or(Path::new("/"));
        Some(User {
            name: name.to_owned(),
            uid,
            gid,
            home: home.to_owned(),
        })
    })
}

/// Lines of group(5): `name:password:gid:member,member`.
fn parse_group(text: &str) -> impl Iterator<Item = (&str, u32, Vec<&str>)> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some((
            name,
            gid,
            fields.next().unwrap_or_default().split(',').collect(),
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwd_is_read_and_rubbish_passed_over() {
        let text = "root:x:0:0:root:/root:/bin/bash\n# comment\n\nuser:x:1000:1001::/home/user:/bin/sh\nbad:x:y:z\n";
        let users: Vec<User> = parse_passwd(text).collect();
        assert_eq!(users.len(), 2);
        assert_eq!(
            (users[1].uid, users[1].gid, users[1].home.as_path()),
            (1000, 1001, Path::new("/home/user"))
        );
    }

    #[test]
    fn group_members_are_whole_names() {
        let groups: Vec<_> = parse_group("sudo:x:27:user,other\nusers:x:100:\n").collect();
        assert_eq!(groups[0], ("sudo", 27, vec!["user", "other"]));
        assert!(!groups[1].2.contains(&"user"));
    }
}
