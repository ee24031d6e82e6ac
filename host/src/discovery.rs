//! Discovery: where workers come and go while the host runs.
//!
//! Contract: a source says all of its workers at once, again at each change; the roster finds out what that means. What a
//! source cannot understand changes nothing that it said before, and is shown as a [`Problem`] until it is mended.

mod file;
#[cfg(feature = "kubernetes")]
mod kubernetes;

use std::{fmt, path::PathBuf, str::FromStr, sync::Arc};

use serde::{Serialize, Serializer};

use crate::{config::WorkerConfig, roster::Roster, tasks};

/// Who named a worker: `static`, for configuration and flags, or a source of discovery.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Origin(Arc<str>);

impl Origin {
    /// Configuration file and flags.
    pub(crate) fn configuration() -> Self {
        Self("static".into())
    }

    /// A source by its name.
    pub(crate) fn of_text(text: &str) -> Self {
        Self(text.into())
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for Origin {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// Something of a source that is not understood, or that there is no room for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Problem {
    /// Which part of it: a file, a slice, a worker.
    pub(crate) place: String,
    pub(crate) reason: String,
}

/// All that a source says at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) workers: Vec<WorkerConfig>,
    pub(crate) problems: Vec<Problem>,
}

/// A source of workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Discovery {
    /// A directory with a file for each worker.
    Files(PathBuf),
    /// EndpointSlices of a namespace that a label selector matches.
    Kubernetes { namespace: String, selector: String },
}

impl Discovery {
    /// Checks, without a network, that it can begin.
    ///
    /// # Errors
    /// Says what is missing.
    pub(crate) fn check(&self) -> Result<(), String> {
        match self {
            Self::Files(path) => match std::fs::read_dir(path) {
                Ok(_) => Ok(()),
                Err(error) => Err(format!("directory {path:?} cannot be read: {error}; make it, or name another")),
            },
            #[cfg(feature = "kubernetes")]
            Self::Kubernetes { .. } => Ok(()),
            #[cfg(not(feature = "kubernetes"))]
            Self::Kubernetes { .. } => {
                Err("this build cannot do it; use a release, or build dynamo-host with --features kubernetes".to_owned())
            }
        }
    }

    /// Begins to bring its workers to a roster: those of a directory are there when this returns.
    ///
    /// # Errors
    /// If it cannot begin.
    pub(crate) async fn start(&self, roster: Arc<Roster>) -> Result<(), String> {
        self.check()?;
        let origin = Origin::of_text(&self.to_string());
        match self {
            Self::Files(path) => {
                let mut directory = file::Directory::new(path.clone());
                directory.bring(&roster, &origin).await;
                tasks::spawn("discovery", async move { directory.watch(&roster, &origin).await });
                Ok(())
            }
            #[cfg(feature = "kubernetes")]
            Self::Kubernetes { namespace, selector } => kubernetes::start(namespace, selector, roster, origin).await,
            #[cfg(not(feature = "kubernetes"))]
            Self::Kubernetes { .. } => Ok(()),
        }
    }
}

impl fmt::Display for Discovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Files(path) => write!(f, "file:{}", path.display()),
            Self::Kubernetes { namespace, selector } => write!(f, "kubernetes:{namespace}/{selector}"),
        }
    }
}

impl FromStr for Discovery {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "use file:DIRECTORY or kubernetes:NAMESPACE/SELECTOR, such as kubernetes:prod/app=vllm".to_owned();
        match text.split_once(':') {
            Some(("file", path)) if !path.is_empty() => Ok(Self::Files(path.into())),
            Some(("kubernetes", rest)) => match rest.split_once('/') {
                Some((namespace, selector)) if !namespace.is_empty() && !selector.is_empty() => {
                    Ok(Self::Kubernetes { namespace: namespace.to_owned(), selector: selector.to_owned() })
                }
                _ => Err(wrong()),
            },
            _ => Err(wrong()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_round_trip_and_others_say_the_form() {
        for text in ["file:/etc/workers", "kubernetes:prod/app.kubernetes.io/name=vllm,tier in (a,b)"] {
            assert_eq!(text.parse::<Discovery>().unwrap().to_string(), text);
        }
        for text in ["", "file:", "dns:x", "kubernetes:prod", "kubernetes:/a=b", "kubernetes:prod/"] {
            assert!(text.parse::<Discovery>().unwrap_err().contains("file:DIRECTORY"), "{text}");
        }
    }
}
