//! Slots: the places where a policy decides.

use std::{fmt, str::FromStr};

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

#[cfg(test)]
mod tests {
    use super::*;

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
