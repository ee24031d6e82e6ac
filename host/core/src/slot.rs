//! Slots: the places where a policy decides, and what happens there when it does not.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// What is decided in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SlotKind {
    /// Which worker serves a request.
    Routing,
    /// Whether and in what order requests are let in.
    Admission,
    /// How many replicas each pool has.
    Autoscaling,
}

impl SlotKind {
    /// Its name in commands, configuration, store keys and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Routing => "routing",
            Self::Admission => "admission",
            Self::Autoscaling => "autoscaling",
        }
    }
}

/// A slot by name: `routing`, `admission` or `autoscaling`, for all models or for one (`routing@MODEL`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotName {
    /// What is decided.
    pub kind: SlotKind,
    /// For which model; all that have no slot of their own if `None`.
    pub model: Option<String>,
}

impl SlotName {
    /// The slot that routes every model without a slot of its own.
    pub const ROUTING: Self = Self { kind: SlotKind::Routing, model: None };
    /// The slot that admits requests for every model without a slot of its own.
    pub const ADMISSION: Self = Self { kind: SlotKind::Admission, model: None };
}

impl fmt::Display for SlotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.as_str())?;
        match &self.model {
            Some(model) => write!(f, "@{model}"),
            None => Ok(()),
        }
    }
}

/// A text that names no slot.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("slot {0:?} is not known; use routing, admission or autoscaling, or SLOT@MODEL for one model")]
pub struct SlotNameError(String);

impl FromStr for SlotName {
    type Err = SlotNameError;

    fn from_str(text: &str) -> Result<Self, SlotNameError> {
        let (kind, model) = match text.split_once('@') {
            Some((kind, model)) if !model.is_empty() => (kind, Some(model.to_owned())),
            Some(_) => return Err(SlotNameError(text.to_owned())),
            None => (text, None),
        };
        let kind = match kind {
            "routing" => SlotKind::Routing,
            "admission" => SlotKind::Admission,
            "autoscaling" => SlotKind::Autoscaling,
            _ => return Err(SlotNameError(text.to_owned())),
        };
        Ok(Self { kind, model })
    }
}

/// What happens to a request that a slot's policy failed to decide.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// The native fallback decides. Where that lets everything in, as in admission, it is also called `open`.
    #[default]
    #[serde(alias = "open")]
    Fallback,
    /// The newest earlier version of the slot that is sound decides; the native fallback if there is none, or if that
    /// fails too.
    LastGood,
    /// Nobody decides: the request is refused.
    Closed,
}

impl OnError {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Fallback, Self::LastGood, Self::Closed];

    /// Its name in commands, configuration and reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fallback => "fallback",
            Self::LastGood => "last-good",
            Self::Closed => "closed",
        }
    }
}

impl fmt::Display for OnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A text that names no [`OnError`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("on-error {0:?} is not known; use fallback (or open, which is the same), last-good or closed")]
pub struct OnErrorError(String);

impl FromStr for OnError {
    type Err = OnErrorError;

    fn from_str(text: &str) -> Result<Self, OnErrorError> {
        if text == "open" {
            return Ok(Self::Fallback);
        }
        Self::ALL.into_iter().find(|mode| mode.as_str() == text).ok_or_else(|| OnErrorError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_on_errors_is_named_alike_everywhere() {
        for mode in OnError::ALL {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        assert_eq!("open".parse(), Ok(OnError::Fallback));
        let error = "ajar".parse::<OnError>().unwrap_err().to_string();
        assert!(error.contains("\"ajar\"") && error.contains("last-good or closed"), "{error}");
    }

    #[test]
    fn names_round_trip() {
        for text in ["routing", "admission", "autoscaling", "routing@meta/llama@8b"] {
            assert_eq!(text.parse::<SlotName>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn an_unknown_slot_says_what_is_known() {
        for text in ["", "route", "routing@", "@m"] {
            let error = text.parse::<SlotName>().unwrap_err().to_string();
            assert!(error.contains("use routing, admission or autoscaling"), "{error}");
        }
    }
}
