//! The kinds of servers that are told apart.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// What an OpenAI-compatible server is. It decides how the server is asked for signs of life and load, and how priority,
/// rank and cancellation are said to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
    /// TensorRT-LLM's `trtllm-serve`.
    Trtllm,
    /// llama.cpp's `llama-server`.
    Llamacpp,
    /// Any other server, asked for nothing but OpenAI's API and `/health`.
    Openai,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 5] = [Self::Vllm, Self::Sglang, Self::Trtllm, Self::Llamacpp, Self::Openai];

    /// The kind's name in configuration, logs and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
            Self::Trtllm => "trtllm",
            Self::Llamacpp => "llamacpp",
            Self::Openai => "openai",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())
    }
}

/// A name that no kind has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "engine kind `{name}` is not known; use one of vllm, sglang, trtllm, llamacpp, openai, or leave it out to have it detected"
)]
pub struct UnknownKind {
    /// What was given.
    pub name: String,
}

impl FromStr for Kind {
    type Err = UnknownKind;

    fn from_str(name: &str) -> Result<Self, UnknownKind> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| UnknownKind { name: name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_written_and_read_by_one_name() {
        for kind in Kind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
            assert_eq!(serde_json::to_string(&kind).unwrap(), format!("\"{kind}\""));
        }
    }

    #[test]
    fn an_unknown_kind_is_refused_with_all_that_are_known() {
        let error = "vLLM".parse::<Kind>().unwrap_err().to_string();
        assert!(error.contains("`vLLM`"), "{error}");
        assert!(Kind::ALL.iter().all(|kind| error.contains(kind.name())), "{error}");
    }
}
