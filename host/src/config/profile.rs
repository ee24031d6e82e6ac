//! A worker's engine profile as labels of it: `profile.FIELD`, so that policies read them as signals.

use std::{collections::BTreeMap, fs, path::Path};

use dynamo_engine_mock::{MockOptions, Profile};

/// Largest file of a profile.
const MAX_BYTES: u64 = 64 << 10;

/// The labels of a worker by its profile: the file's; of a mock engine without one its own, which is known.
///
/// # Errors
/// Says why the file is no profile.
pub(super) fn labels(url: &str, file: Option<&Path>) -> Result<BTreeMap<String, String>, String> {
    match file {
        Some(path) => Ok(read(path)?.labels()),
        // One that cannot be is refused when it is started, with all that is wrong.
        None if url.starts_with("mock://") => {
            Ok(MockOptions::from_url(url).map(|mock| mock.profile.labels()).unwrap_or_default())
        }
        None => Ok(BTreeMap::new()),
    }
}

fn read(path: &Path) -> Result<Profile, String> {
    let wrong = |reason: String| format!("profile {path:?} {reason}; write one with: dynamo-host profile URL --out FILE");
    let size = fs::metadata(path).map_err(|error| wrong(format!("cannot be read: {error}")))?.len();
    if size > MAX_BYTES {
        return Err(wrong(format!("has {size} bytes, and a profile at most {MAX_BYTES}")));
    }
    let text = fs::read_to_string(path).map_err(|error| wrong(format!("cannot be read: {error}")))?;
    let profile: Profile = serde_json::from_str(&text).map_err(|error| wrong(format!("is no engine profile: {error}")))?;
    profile.validate().map_err(|error| wrong(format!("cannot be true: {error}")))?;
    Ok(profile)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_labels_that_are_numbers_and_a_mock_engines_is_known() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("engine.json");
        fs::write(&file, r#"{"block_size":32,"prefill_ms_per_token":0.5,"speedup":2}"#).unwrap();
        let read = labels("http://h", Some(&file)).unwrap();
        assert_eq!((read["profile.block_size"].as_str(), read["profile.prefill_ms_per_token"].as_str()), ("32", "0.25"));
        assert!(read.values().all(|value| value.parse::<f32>().is_ok()) && !read.contains_key("profile.speedup"), "{read:?}");
        assert_eq!(labels("mock://a?kv_blocks=5000&speedup=10", None).unwrap()["profile.kv_blocks"], "5000");
        assert_eq!(labels("mock://a?speedup=10", None).unwrap()["profile.decode_ms_base"], "0.6");
        assert!(labels("http://h", None).unwrap().is_empty());
    }

    #[test]
    fn what_is_no_profile_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("engine.json");
        for (text, says) in [
            ("{", "is no engine profile"),
            (r#"{"blocksize":1}"#, "unknown field `blocksize`"),
            (r#"{"decode_ms_base":-1}"#, "decode_ms_base=-1"),
        ] {
            fs::write(&file, text).unwrap();
            let error = labels("http://h", Some(&file)).unwrap_err();
            assert!(error.contains(says) && error.contains("engine.json"), "{error}");
        }
        assert!(labels("http://h", Some(Path::new("/none"))).unwrap_err().contains("cannot be read"));
    }
}
