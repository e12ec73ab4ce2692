//! What is built under one name: E2B's template. It has an id of its own and tags, and each tag leads to a template of ours;
//! building it again moves its tags. Kept in one small file, which is replaced as a whole.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use icebox_api::types::TemplateTag;
use icebox_engine::id::{Team, TemplateId};
use jiff::Timestamp;
use rand::RngExt as _;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::lock;

/// The tag that is meant where none is named.
pub(super) const DEFAULT: &str = "default";

const FILE: &str = "template-names.json";
const FORMAT: u32 = 1;

/// `name`, `name:tag`, or an id in the name's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reference<'a> {
    pub(super) name: &'a str,
    tag: Option<&'a str>,
}

impl<'a> Reference<'a> {
    pub(super) fn read(text: &'a str) -> Self {
        match text.split_once(':') {
            Some((name, tag)) => Self {
                name,
                tag: Some(tag),
            },
            None => Self {
                name: text,
                tag: None,
            },
        }
    }

    /// The tag, if it is one that has to be named.
    pub(super) fn other_tag(&self) -> Option<&'a str> {
        self.tag.filter(|tag| *tag != DEFAULT)
    }

    pub(super) fn tag_or_default(&self) -> &'a str {
        self.tag.unwrap_or(DEFAULT)
    }
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format: u32,
    families: BTreeMap<String, Family>,
}

/// What is built under one name.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Family {
    id: String,
    tags: BTreeMap<String, Tagged>,
}

/// What a tag leads to.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tagged {
    template: String,
    build: String,
    created_at: Timestamp,
}

/// All names.
pub(super) struct Families {
    path: PathBuf,
    known: Mutex<BTreeMap<String, Family>>,
}

impl Families {
    pub(super) fn open(data: &Path) -> io::Result<Self> {
        let path = data.join(FILE);
        let document: Document = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Document::default(),
            Err(error) => return Err(error),
        };
        if document.format > FORMAT {
            let message = format!("{} is of a newer icebox", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok(Self {
            path,
            known: Mutex::new(document.families),
        })
    }

    /// The id of what has this name, or id, and is a team's.
    pub(super) fn find(&self, team: &Team, wanted: &str) -> Option<String> {
        let known = lock(&self.known);
        let found = known.get(&key(team, wanted)).or_else(|| {
            let own = key(team, "");
            let mut own = known.iter().filter(|(name, _)| name.starts_with(&own));
            own.find(|(_, it)| it.id == wanted).map(|(_, it)| it)
        });
        found.map(|it| it.id.clone())
    }

    /// How many names a team has.
    pub(super) fn count(&self, team: &Team) -> usize {
        let own = key(team, "");
        let known = lock(&self.known);
        known.keys().filter(|name| name.starts_with(&own)).count()
    }

    /// The template that a reference leads to.
    pub(super) fn resolve(&self, team: &Team, wanted: &Reference<'_>) -> Option<String> {
        let id = self.find(team, wanted.name)?;
        let known = lock(&self.known);
        let family = known.values().find(|it| it.id == id)?;
        let tagged = family.tags.get(wanted.tag_or_default())?;
        Some(tagged.template.clone())
    }

    /// The id of a name, which is made if it is new.
    pub(super) fn id_of(&self, team: &Team, name: &str) -> io::Result<String> {
        self.change(|known| {
            let family = known.entry(key(team, name)).or_insert_with(|| Family {
                id: TemplateId::random().to_string(),
                tags: BTreeMap::new(),
            });
            family.id.clone()
        })
    }

    /// Has tags lead to what was built; answers the templates that none leads to any more.
    pub(super) fn built(
        &self,
        team: &Team,
        name: &str,
        tags: &[String],
        template: &str,
        build: &str,
    ) -> io::Result<Vec<String>> {
        self.change(|known| {
            let Some(family) = known.get_mut(&key(team, name)) else {
                return Vec::new();
            };
            let before = family.templates();
            let tagged = Tagged {
                template: template.to_owned(),
                build: build.to_owned(),
                created_at: Timestamp::now(),
            };
            let tags = tags.iter().map(|tag| (tag.clone(), tagged.clone()));
            family.tags.extend(tags);
            before.difference(&family.templates()).cloned().collect()
        })
    }

    pub(super) fn assign(
        &self,
        team: &Team,
        target: &Reference<'_>,
        tags: &[String],
    ) -> io::Result<Option<String>> {
        let Some(id) = self.find(team, target.name) else {
            return Ok(None);
        };
        self.change(|known| {
            let family = known.values_mut().find(|it| it.id == id)?;
            let tagged = family.tags.get(target.tag_or_default())?.clone();
            let build = tagged.build.clone();
            let tags = tags.iter().map(|tag| (tag.clone(), tagged.clone()));
            family.tags.extend(tags);
            Some(build)
        })
    }

    /// Takes tags away; answers the templates that none leads to any more.
    pub(super) fn untag(
        &self,
        team: &Team,
        name: &str,
        tags: &[String],
    ) -> io::Result<Option<Vec<String>>> {
        let Some(id) = self.find(team, name) else {
            return Ok(None);
        };
        self.change(|known| {
            let family = known.values_mut().find(|it| it.id == id)?;
            let before = family.templates();
            family.tags.retain(|tag, _| !tags.contains(tag));
            Some(before.difference(&family.templates()).cloned().collect())
        })
    }

    pub(super) fn tags(&self, team: &Team, wanted: &Reference<'_>) -> Option<Vec<TemplateTag>> {
        let id = self.find(team, wanted.name)?;
        let known = lock(&self.known);
        let family = known.values().find(|it| it.id == id)?;
        let tags = family.tags.iter().map(|(tag, tagged)| TemplateTag {
            tag: tag.clone(),
            build_id: tagged.build.clone(),
            created_at: tagged.created_at,
        });
        Some(tags.collect())
    }

    pub(super) fn name_of(&self, template: &str) -> Option<String> {
        let known = lock(&self.known);
        let leads = |family: &Family| family.tags.values().any(|it| it.template == template);
        let (name, _) = known.iter().find(|(_, family)| leads(family))?;
        Some(name.rsplit('/').next().unwrap_or(name).to_owned())
    }

    pub(super) fn names_of(&self, template: &str) -> Vec<String> {
        let known = lock(&self.known);
        let names = known.iter().flat_map(|(name, family)| {
            let name = name.rsplit_once('/').map_or(&**name, |(_, name)| name);
            let tags = family.tags.iter();
            tags.filter(|(_, tagged)| tagged.template == template)
                .map(move |(tag, _)| format!("{name}:{tag}"))
        });
        names.collect()
    }

    pub(super) fn templates(&self, id: &str) -> Vec<String> {
        let known = lock(&self.known);
        let family = known.values().find(|it| it.id == id);
        family.map_or_else(Vec::new, |it| it.templates().into_iter().collect())
    }

    pub(super) fn remove(&self, id: &str) -> io::Result<()> {
        self.change(|known| known.retain(|_, family| family.id != id))
    }

    /// Changes what is known once the change is on disk. Blocks for that: the file is small.
    fn change<T>(&self, change: impl FnOnce(&mut BTreeMap<String, Family>) -> T) -> io::Result<T> {
        let mut known = lock(&self.known);
        let mut families = known.clone();
        let answer = change(&mut families);
        let document = Document {
            format: FORMAT,
            families,
        };
        let directory = self.path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(directory)?;
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        file.write_all(&serde_json::to_vec_pretty(&document)?)?;
        file.as_file().sync_all()?;
        file.persist(&self.path)?;
        std::fs::File::open(directory)?.sync_all()?;
        *known = document.families;
        Ok(answer)
    }
}

/// What a team's name is kept under.
fn key(team: &Team, name: &str) -> String {
    format!("{}/{name}", team.as_str())
}

impl Family {
    fn templates(&self) -> BTreeSet<String> {
        self.tags.values().map(|it| it.template.clone()).collect()
    }
}

/// A random UUID (RFC 9562, version 4), which E2B's clients want a build's id to be.
pub(super) fn uuid() -> String {
    written(rand::rng().random(), 4)
}

/// The UUID (RFC 9562, version 8) of a template that no build by steps made: always the same for an id.
pub(super) fn uuid_of(id: &str) -> String {
    let digest: [u8; 32] = Sha256::digest(id).into();
    let (bits, _) = digest.split_at(16);
    let bits = bits
        .iter()
        .fold(0, |bits, byte| bits << 8 | u128::from(*byte));
    written(bits, 8)
}

/// Bits as a UUID of this version.
fn written(bits: u128, version: u128) -> String {
    let bits = bits & !(0xf << 76) | (version << 76);
    let bits = bits & !(0b11 << 62) | (0b10 << 62);
    let hex = format!("{bits:032x}");
    let parts = [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ];
    parts.join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_is_a_name_with_or_without_a_tag() {
        for (text, name, tag) in [("a", "a", DEFAULT), ("a:v1", "a", "v1")] {
            let read = Reference::read(text);
            assert_eq!((read.name, read.tag_or_default()), (name, tag), "{text}");
        }
    }

    #[test]
    fn tags_move_and_what_they_led_to_is_told() {
        let data = tempfile::tempdir().expect("a directory");
        let (team, other) = (Team::default(), "other".parse().expect("a team"));
        let families = Families::open(data.path()).expect("none yet");
        let id = families.id_of(&team, "app").expect("kept");
        let default = [DEFAULT.to_owned()];
        assert_eq!(families.resolve(&team, &Reference::read("app")), None);
        assert!(
            families
                .built(&team, "app", &default, "t1", "b1")
                .expect("kept")
                .is_empty()
        );
        let target = Reference::read("app");
        let stable = ["stable".to_owned()];
        assert_eq!(
            families
                .assign(&team, &target, &stable)
                .expect("kept")
                .as_deref(),
            Some("b1")
        );
        assert!(
            families
                .built(&team, "app", &default, "t2", "b2")
                .expect("kept")
                .is_empty()
        );
        let again = Families::open(data.path()).expect("what was kept");
        assert_eq!(again.find(&team, "app"), Some(id.clone()));
        assert_eq!(
            again.resolve(&team, &Reference::read(&id)).as_deref(),
            Some("t2")
        );
        assert_eq!(
            again
                .resolve(&team, &Reference::read("app:stable"))
                .as_deref(),
            Some("t1")
        );
        assert_eq!(again.names_of("t1"), ["app:stable"]);
        assert_eq!(
            again.untag(&team, "app", &stable).expect("kept"),
            Some(vec!["t1".to_owned()])
        );
        assert_eq!(again.find(&other, "app"), None);
        assert_eq!(again.find(&other, &id), None);
        again.remove(&id).expect("kept");
        assert_eq!(again.find(&team, "app"), None);
    }

    #[test]
    fn a_uuid_says_what_it_is_made_of() {
        for (id, version) in [(uuid(), "4"), (uuid_of("t1"), "8")] {
            let parts: Vec<_> = id.split('-').map(str::len).collect();
            assert_eq!(parts, [8, 4, 4, 4, 12]);
            assert_eq!(&id[14..15], version);
            assert!("89ab".contains(&id[19..20]), "{id}");
        }
        assert_eq!(uuid_of("t1"), uuid_of("t1"));
        assert_ne!(uuid_of("t1"), uuid_of("t2"));
    }
}
