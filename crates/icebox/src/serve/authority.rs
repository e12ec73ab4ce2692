//! A certificate authority of this host's own, for who has no certificate and wants HTTPS all the same: on one machine,
//! under names like `*.icebox.localhost`.
//!
//! ```text
//!   <data>/authority/<domain>.key   private to the daemon's user
//!   <data>/authority/<domain>.pem   what programs have to trust; never changes while it is there
//! ```
//! It signs for its domain and this machine's own addresses alone, whoever gets its key: programs that trust it trust it for
//! nothing else. What it signs for the daemon is kept nowhere, and made anew by each one.

use std::fs::{DirBuilder, File};
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use jiff::{Timestamp, ToSpan as _, Zoned, tz::TimeZone};
use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    NameConstraints, SanType, date_time_ymd,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::failure::Failure;

/// The domain where no other is set: RFC 6761 has every name that ends so lead to this machine.
pub(crate) const DOMAIN: &str = "icebox.localhost";

const DIRECTORY: &str = "authority";
/// How long programs need not be told to trust another one: ten years.
const DAYS_OF_AUTHORITY: i64 = 3650;
/// How long what it signs is valid: less than the 398 days that browsers take.
const DAYS: i64 = 390;
/// A domain's longest name (RFC 1035).
const NAME_MAX: usize = 253;

/// Why there is no authority.
#[derive(Debug, thiserror::Error)]
enum AuthorityError {
    #[error("cannot {op} {}", path.display())]
    Io {
        op: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("cannot make a certificate")]
    Certificate(#[from] rcgen::Error),
    #[error("{0:?} is no domain that a certificate could be for")]
    Domain(String),
}

fn at(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> AuthorityError {
    let path = path.to_owned();
    move |source| AuthorityError::Io { op, path, source }
}

/// An authority for one domain.
pub(crate) struct Authority {
    domain: String,
    path: PathBuf,
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate with its key.
pub(super) struct Signed {
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: PrivateKeyDer<'static>,
}

impl Authority {
    /// The authority for `domain`, a port behind it left out, that is kept in `data`; made if there is none. Blocks.
    ///
    /// # Errors
    /// It cannot be read or kept, or `domain` is none.
    pub(crate) fn open(data: &Path, domain: &str) -> Result<Self, Failure> {
        Self::opened(data, domain).map_err(|error| {
            Failure::because("there is no certificate authority", &error).hint(
                "it is kept in the data directory: run this as who runs the daemon, and see that `domain` is a domain's name",
            )
        })
    }

    fn opened(data: &Path, domain: &str) -> Result<Self, AuthorityError> {
        let domain = domain.split(':').next().unwrap_or_default();
        let domain = domain.to_ascii_lowercase();
        if !is_domain(&domain) {
            return Err(AuthorityError::Domain(domain));
        }
        let directory = data.join(DIRECTORY);
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&directory)
            .map_err(at("make", &directory))?;
        let key = kept_key(&directory, &domain)?;
        let path = directory.join(format!("{domain}.pem"));
        let params = authority_of(&domain);
        let pem = match std::fs::read_to_string(&path) {
            Ok(pem) => pem,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let pem = params.self_signed(&key)?.pem();
                keep(&directory, &path, pem.as_bytes(), 0o644)?;
                // Whoever was first.
                std::fs::read_to_string(&path).map_err(at("read", &path))?
            }
            Err(error) => return Err(at("read", &path)(error)),
        };
        Ok(Self {
            issuer: Issuer::new(params, key),
            domain,
            path,
            pem,
        })
    }

    /// What it signs for, and all below it.
    pub(crate) fn domain(&self) -> &str {
        &self.domain
    }

    /// Where its certificate is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Its certificate, PEM.
    pub(crate) fn pem(&self) -> &str {
        &self.pem
    }

    /// A certificate for the domain, names below it, and this machine.
    pub(super) fn sign(&self) -> Result<Signed, rcgen::Error> {
        let key = KeyPair::generate()?;
        let names = [
            self.domain.clone(),
            format!("*.{}", self.domain),
            "localhost".to_owned(),
        ];
        let mut params = CertificateParams::new(names)?;
        for address in [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
            params.subject_alt_names.push(SanType::IpAddress(address));
        }
        params.distinguished_name = called(&self.domain);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        valid_for(&mut params, DAYS);
        let signed = params.signed_by(&key, &self.issuer)?;
        Ok(Signed {
            chain: vec![signed.der().clone()],
            key: PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
        })
    }
}

/// What the authority itself is; but for its times, always the same for a domain, since what it signs names it by this.
fn authority_of(domain: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = called(&format!("icebox local CA for {domain}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.name_constraints = Some(NameConstraints {
        permitted_subtrees: vec![
            GeneralSubtree::DnsName(domain.to_owned()),
            GeneralSubtree::DnsName("localhost".to_owned()),
            GeneralSubtree::IpAddress(CidrSubnet::V4([127, 0, 0, 0], [255, 0, 0, 0])),
            GeneralSubtree::IpAddress(CidrSubnet::V6(Ipv6Addr::LOCALHOST.octets(), [0xff; 16])),
        ],
        excluded_subtrees: Vec::new(),
    });
    valid_for(&mut params, DAYS_OF_AUTHORITY);
    params
}

fn called(name: &str) -> DistinguishedName {
    let mut called = DistinguishedName::new();
    called.push(DnType::CommonName, name);
    called
}

/// From yesterday on, for clients whose clock is a little late.
fn valid_for(params: &mut CertificateParams, days: i64) {
    let now = Timestamp::now().to_zoned(TimeZone::UTC);
    let midnight = |day: &Zoned| {
        let (month, date) = (day.month().unsigned_abs(), day.day().unsigned_abs());
        date_time_ymd(i32::from(day.year()), month, date)
    };
    params.not_before = midnight(&now.saturating_sub(1.day()));
    params.not_after = midnight(&now.saturating_add(days.days()));
}

/// The authority's key, made if there is none.
fn kept_key(directory: &Path, domain: &str) -> Result<KeyPair, AuthorityError> {
    let path = directory.join(format!("{domain}.key"));
    let read = || std::fs::read_to_string(&path);
    let text = match read() {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = KeyPair::generate()?.serialize_pem();
            keep(directory, &path, key.as_bytes(), 0o600)?;
            read().map_err(at("read", &path))?
        }
        Err(error) => return Err(at("read", &path)(error)),
    };
    Ok(KeyPair::from_pem(&text)?)
}

/// Puts a file in place as a whole, unless somebody else has by then.
fn keep(directory: &Path, path: &Path, content: &[u8], mode: u32) -> Result<(), AuthorityError> {
    let mut draft = path.as_os_str().to_owned();
    draft.push(format!(".{}", std::process::id()));
    let draft = PathBuf::from(draft);
    let written = || -> io::Result<()> {
        let mut options = File::options();
        let mut file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&draft)?;
        file.write_all(content)?;
        file.sync_all()?;
        match std::fs::hard_link(&draft, path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => std::fs::remove_file(&draft)?,
        }
        File::open(directory)?.sync_all()
    };
    written().map_err(at("write", path))
}

/// Whether this is the name of a domain, and so one path component.
fn is_domain(text: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    text.len() <= NAME_MAX && text.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn an_authority_stays_what_programs_trust_and_its_key_is_private() {
        let data = tempfile::tempdir().expect("a directory");
        let open = |domain| Authority::open(data.path(), domain).map_err(|it| it.body().clone());
        let first = open("Icebox.localhost:8443").expect("made");
        assert_eq!(first.domain(), DOMAIN);
        let again = open(DOMAIN).expect("it is there");
        assert_eq!((again.pem(), again.path()), (first.pem(), first.path()));
        let other = open("sandbox.example").expect("made");
        assert_ne!(other.pem(), first.pem());
        let key = first.path().with_extension("key");
        let mode = std::fs::metadata(key).expect("it is there").permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);
        let files = std::fs::read_dir(data.path().join(DIRECTORY)).expect("it is there");
        assert_eq!(files.count(), 4, "nothing else is left");
    }

    #[test]
    fn inv_41_a_domain_is_a_domain_and_no_path() {
        let data = tempfile::tempdir().expect("a directory");
        let long = "x".repeat(64);
        for wrong in [
            "", ".", "..", "a/b", "../a", "a..b", "-a.b", "é.org", "a b", &long,
        ] {
            assert!(Authority::open(data.path(), wrong).is_err(), "{wrong:?}");
        }
    }
}
