//! What goes wrong with a model's files, and with a prompt.

use std::path::PathBuf;

/// A model directory that tokens cannot be computed from.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file that must be there is not, or cannot be read.
    #[error(
        "{path:?} cannot be read: {reason}; name a model's directory as Hugging Face lays it out, with tokenizer.json and \
         tokenizer_config.json"
    )]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// A file that does not say what it should.
    #[error("{path:?} is not what it should be: {reason}; {fix}")]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it, and where.
        reason: String,
        /// What to do.
        fix: &'static str,
    },
}

/// Why a prompt has no ids: the engine will most likely refuse it too.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// The body has no prompt that could be read.
    #[error("the prompt cannot be read: {0}")]
    Unreadable(String),
    /// The model has no chat template.
    #[error("the model has no chat template")]
    NoTemplate,
    /// Its template refuses the chat.
    #[error("the chat template failed: {0}")]
    Template(String),
    /// The tokenizer refuses the text.
    #[error("the tokenizer failed: {0}")]
    Tokenizer(String),
}
