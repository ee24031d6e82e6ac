//! Who a policy is: a name for people, a digest for certainty.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// SHA-256 of a component's bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The first eight hexadecimal digits, for people.
    #[must_use]
    pub fn short(&self) -> String {
        self.to_string()[..8].to_owned()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

impl FromStr for Digest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a digest; expected 64 hexadecimal digits");
        let mut bytes = [0; 32];
        if text.len() != 64 || !text.is_ascii() {
            return Err(wrong());
        }
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| wrong())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| wrong())?;
        }
        Ok(Self(bytes))
    }
}

/// What a policy calls itself, from its `dynamo:policy` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyName {
    /// Name.
    pub name: String,
    /// Semantic version.
    pub version: String,
    /// Author; may be empty.
    pub author: String,
}

impl PolicyName {
    /// Bytes of any part of a name; it becomes a metric label and a header.
    const MAX_BYTES: usize = 128;

    /// Reads the section: lines of `key: value`; unknown keys are for later hosts.
    ///
    /// # Errors
    /// Says which key is missing or malformed.
    pub(crate) fn parse(section: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(section).map_err(|_| "is not UTF-8".to_owned())?;
        let value = |key: &str| {
            let found = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
            let value = found.map(str::trim).unwrap_or_default();
            let printable = value.chars().all(|c| c.is_ascii_graphic() || c == ' ');
            if value.len() > Self::MAX_BYTES || !printable {
                return Err(format!("has a {key} that is longer than {} bytes or not printable ASCII", Self::MAX_BYTES));
            }
            Ok(value.to_owned())
        };
        let named = Self { name: value("name")?, version: value("version")?, author: value("author").unwrap_or_default() };
        if named.name.is_empty() || named.version.is_empty() {
            return Err("lacks a line `name: …` or `version: …`".to_owned());
        }
        Ok(named)
    }
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.name, self.version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_round_trips_and_nonsense_is_refused() {
        let digest = Digest::of(b"abc");
        assert_eq!(digest.short(), "ba7816bf");
        assert_eq!(digest.to_string().parse::<Digest>(), Ok(digest));
        for text in ["", "ba78", &"zz".repeat(32), &"é".repeat(32)] {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_section_names_the_policy() {
        let name = PolicyName::parse(b"name: kv-aware\nversion: 1.2.0\nauthor: A <a@b>\nlater: x\n").unwrap();
        assert_eq!(name.to_string(), "kv-aware@1.2.0");
        assert_eq!(name.author, "A <a@b>");
    }

    #[test]
    fn a_section_without_name_or_with_control_characters_is_refused() {
        assert!(PolicyName::parse(b"version: 1\n").is_err());
        assert!(PolicyName::parse(b"name: a\tb\nversion: 1\n").is_err());
        assert!(PolicyName::parse(format!("name: {}\nversion: 1\n", "x".repeat(200)).as_bytes()).is_err());
        assert!(PolicyName::parse(&[0xff]).is_err());
    }
}
