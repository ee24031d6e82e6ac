//! API keys: a TOML file of their hashes, one `[[key]]` each, read again when it changes.
//!
//! A key is 256 random bits, so that a plain SHA-256 keeps it: there is nothing to guess. The table is looked up by
//! that hash; how long it takes tells of the hash, not of the key. What cannot be read leaves what was read before.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwap;
use dynamo_host_core::admission::{MAX_CLASS_BYTES, is_class};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use toml::value::Datetime;

use super::MAX_TENANT_BYTES;
use crate::{clock::unix_ms_of, text::plain, watch};

/// Most keys of one file.
const MAX_KEYS: usize = 1_000_000;

/// How keys of ours begin: secret scanners find them by it.
const PREFIX: &str = "dh-";

type Hash = [u8; 32];

/// A file of keys that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeysError {
    #[error("keys file {path:?} cannot be read: {reason}")]
    Unreadable { path: PathBuf, reason: String },
    #[error("keys file {path:?}: {reason}")]
    Syntax { path: PathBuf, reason: String },
    #[error("keys file {path:?}, key {number} (tenant {tenant:?}): {reason}")]
    Key { path: PathBuf, number: usize, tenant: String, reason: String },
}

/// What a key is good for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) tenant: String,
    pub(crate) priority: i32,
    /// Of its requests, for the queue.
    pub(crate) class: Option<Arc<str>>,
    /// Names of models, the last character of each perhaps `*`; all if there is no list.
    models: Option<Vec<String>>,
    /// In milliseconds since 1970.
    pub(super) expires_ms: Option<u64>,
}

impl Key {
    pub(super) fn allows(&self, model: &str) -> bool {
        let matches = |pattern: &String| match pattern.strip_suffix('*') {
            Some(prefix) => model.starts_with(prefix),
            None => pattern == model,
        };
        self.models.as_ref().is_none_or(|models| models.iter().any(matches))
    }
}

/// All keys, as the file last said.
#[derive(Debug)]
pub(crate) struct Keys {
    path: PathBuf,
    table: ArcSwap<HashMap<Hash, Arc<Key>>>,
}

impl Keys {
    /// Reads a file.
    ///
    /// # Errors
    /// Names the key that is wrong, and what would be right.
    pub(crate) fn load(path: &Path) -> Result<Self, KeysError> {
        let table = read(path)?;
        if table.is_empty() {
            tracing::warn!("keys file {path:?} has no [[key]]: nobody is let in; add one with dynamo-host key new TENANT");
        }
        Ok(Self { path: path.to_owned(), table: ArcSwap::from_pointee(table) })
    }

    /// Reads the file again, and from then on lets in whom it names.
    ///
    /// # Errors
    /// As [`load`](Self::load); then all is as before.
    pub(crate) fn reload(&self) -> Result<(), KeysError> {
        self.table.store(Arc::new(read(&self.path)?));
        Ok(())
    }

    /// Reloads whenever the file changes.
    pub(crate) fn watch(self: &Arc<Self>) {
        let keys = Arc::clone(self);
        watch::files("API keys", vec![self.path.clone()], move || keys.reload());
    }

    pub(super) fn find(&self, key: &[u8]) -> Option<Arc<Key>> {
        self.table.load().get(&Hash::from(Sha256::digest(key))).cloned()
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    key: Vec<FileKey>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileKey {
    sha256: String,
    tenant: String,
    #[serde(default)]
    priority: i32,
    #[serde(default)]
    class: Option<String>,
    #[serde(default)]
    models: Option<Vec<String>>,
    #[serde(default)]
    expires: Option<Datetime>,
}

fn read(path: &Path) -> Result<HashMap<Hash, Arc<Key>>, KeysError> {
    let unreadable = |error: io::Error| KeysError::Unreadable { path: path.to_owned(), reason: error.to_string() };
    let text = fs::read_to_string(path).map_err(unreadable)?;
    parse(path, &text)
}

/// Whether these lines are such a file.
///
/// # Errors
/// Why not.
pub(crate) fn check(lines: &str) -> Result<(), String> {
    match parse(Path::new("-"), lines) {
        Ok(_) => Ok(()),
        Err(KeysError::Key { reason, .. } | KeysError::Syntax { reason, .. } | KeysError::Unreadable { reason, .. }) => {
            Err(reason)
        }
    }
}

fn parse(path: &Path, text: &str) -> Result<HashMap<Hash, Arc<Key>>, KeysError> {
    let syntax = |reason: String| KeysError::Syntax { path: path.to_owned(), reason };
    // Line, column and what is accepted; the line itself may hold a key that was put there by mistake.
    let file: File = toml::from_str(text).map_err(|error| {
        let line = error.span().map_or(0, |span| 1 + text[..span.start.min(text.len())].matches('\n').count());
        syntax(format!("line {line}: {}", plain(error.message())))
    })?;
    if file.key.len() > MAX_KEYS {
        return Err(syntax(format!("it has {} keys; use at most {MAX_KEYS}", file.key.len())));
    }
    let mut table = HashMap::with_capacity(file.key.len());
    for (at, key) in file.key.into_iter().enumerate() {
        let tenant = plain(&key.tenant);
        let wrong = |reason: String| KeysError::Key { path: path.to_owned(), number: at + 1, tenant: tenant.clone(), reason };
        let hash = unhex(&key.sha256).ok_or_else(|| {
            wrong("sha256 is not 64 hexadecimal digits; write the key's SHA-256, as dynamo-host key new prints it".to_owned())
        })?;
        if table.insert(hash, Arc::new(checked(key).map_err(&wrong)?)).is_some() {
            return Err(wrong("another [[key]] has the same sha256; remove one".to_owned()));
        }
    }
    Ok(table)
}

fn checked(key: FileKey) -> Result<Key, String> {
    let FileKey { tenant, priority, class, models, expires, .. } = key;
    if tenant.is_empty() || tenant.len() > MAX_TENANT_BYTES || tenant.contains(char::is_control) {
        return Err(format!("tenant is not 1 to {MAX_TENANT_BYTES} bytes of printable text"));
    }
    if let Some(pattern) = models.iter().flatten().find(|name| name.is_empty() || name[..name.len() - 1].contains('*')) {
        return Err(format!("models has {:?}; write a model's name, or its beginning and a final *", plain(pattern)));
    }
    let expected = "write a date such as 2027-01-31, or a time with its offset such as 2027-01-31T18:00:00Z";
    let expires_ms = expires.map(|moment| unix_ms_of(moment).ok_or_else(|| format!("expires is {moment}; {expected}")));
    let expires_ms = expires_ms.transpose()?;
    if let Some(class) = class.as_deref().filter(|class| !is_class(class)) {
        let class = plain(class);
        return Err(format!("class is {class:?}; write 1 to {MAX_CLASS_BYTES} letters, digits, `.`, `_` or `-`"));
    }
    Ok(Key { tenant, priority, class: class.map(Arc::from), models, expires_ms })
}

fn unhex(text: &str) -> Option<Hash> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let text = text.as_bytes();
    let mut hash = Hash::default();
    if text.len() != 2 * hash.len() {
        return None;
    }
    for (byte, digits) in hash.iter_mut().zip(text.chunks_exact(2)) {
        *byte = (digit(digits[0])? * 16 + digit(digits[1])?) as u8;
    }
    Some(hash)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A key that nobody has yet.
pub(crate) struct NewKey {
    /// What the client sends. It is nowhere else.
    pub(crate) key: String,
    /// What the file keeps of it.
    pub(crate) sha256: String,
}

impl NewKey {
    /// Makes one.
    ///
    /// # Errors
    /// If the system gives no randomness.
    pub(crate) fn random() -> Result<Self, String> {
        let mut bits = [0; 32];
        let provider = rustls::crypto::ring::default_provider();
        provider.secure_random.fill(&mut bits).map_err(|_| "the system gives no randomness for a new key".to_owned())?;
        let key = format!("{PREFIX}{}", hex(&bits));
        Ok(Self { sha256: hex(&Sha256::digest(&key)), key })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"; // of "key"

    fn keys(text: &str) -> Result<Keys, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.toml");
        fs::write(&path, text).unwrap();
        Keys::load(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn a_key_is_found_by_its_hash_and_says_whose_it_is() {
        let keys = keys(&format!(
            "[[key]]\nsha256 = \"{HASH}\"\ntenant = \"acme\"\npriority = -3\nclass = \"batch\"\nmodels = [\"llama-*\", \"qwen\"]\nexpires = 2000-03-01\n"
        ));
        let keys = keys.unwrap();
        let key = keys.find(b"key").unwrap();
        assert_eq!((key.tenant.as_str(), key.priority, key.expires_ms), ("acme", -3, Some(951_868_800_000)));
        assert_eq!(key.class.as_deref(), Some("batch"));
        assert!(key.allows("llama-3") && key.allows("qwen") && !key.allows("qwen2") && !key.allows("llama"));
        assert!(keys.find(b"KEY").is_none() && keys.find(b"").is_none());
    }

    #[test]
    fn a_new_key_is_found_under_what_the_file_keeps_and_none_is_like_another() {
        let (one, other) = (NewKey::random().unwrap(), NewKey::random().unwrap());
        let keys = keys(&format!("[[key]]\nsha256 = \"{}\"\ntenant = \"t\"\n", one.sha256)).unwrap();
        assert_eq!(
            *keys.find(one.key.as_bytes()).unwrap(),
            Key { tenant: "t".to_owned(), priority: 0, class: None, models: None, expires_ms: None }
        );
        assert!(keys.find(other.key.as_bytes()).is_none() && one.key.len() == 67);
    }

    #[test]
    fn what_is_wrong_is_named_and_keys_are_not_shown() {
        for (text, says) in [
            ("[[key]]\nsha256 = \"dh-secret\"\ntenant = \"a\"", "key 1 (tenant \"a\"): sha256 is not 64 hexadecimal"),
            ("[[key]]\nkey = \"dh-secret\"\ntenant = \"a\"", "line 2: unknown field `key`"),
            (&format!("[[key]]\nsha256 = \"{HASH}\"\ntenant = \"\""), "tenant is not 1 to 128"),
            (&format!("[[key]]\nsha256 = \"{HASH}\"\ntenant = \"a\"\nmodels = [\"a*b\"]"), "models has \"a*b\""),
            (&format!("[[key]]\nsha256 = \"{HASH}\"\ntenant = \"a\"\nclass = \"a b\""), "class is \"a b\""),
            (&format!("[[key]]\nsha256 = \"{HASH}\"\ntenant = \"a\"\nexpires = 12:00:00"), "write a date"),
            (&format!("[[key]]\nsha256 = \"{HASH}\"\ntenant = \"a\"\n").repeat(2), "key 2 (tenant \"a\"): another"),
        ] {
            let error = keys(text).unwrap_err();
            assert!(error.contains(says) && !error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn what_cannot_be_read_again_leaves_what_was_read_before() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.toml");
        fs::write(&path, format!("[[key]]\nsha256 = \"{HASH}\"\ntenant = \"a\"\n")).unwrap();
        let keys = Keys::load(&path).unwrap();
        fs::write(&path, "[[key").unwrap();
        keys.reload().unwrap_err();
        assert!(keys.find(b"key").is_some());
        fs::write(&path, "").unwrap();
        keys.reload().unwrap();
        assert!(keys.find(b"key").is_none());
    }
}
