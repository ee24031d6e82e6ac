//! Names of models: what clients may ask for, and which model and adapter of which workers that is.
//!
//! Pure: what is configured, what engines list and who is ready are arguments. An alias is another name; a fallback is
//! another model, taken when no worker of the one asked for is ready. Fallbacks of fallbacks are not followed, so that
//! what can be served for a name is what stands at it.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    path::PathBuf,
};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor, value::MapAccessDeserializer},
};

/// Most fallbacks of one name.
const MAX_FALLBACKS: usize = 16;

/// Where the tokens of a model's prompts come from: `"engine"`, or a directory. A directory of that name is `./engine`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(from = "PathBuf")]
pub(crate) enum TokenizerSource {
    /// Its own files, as Hugging Face lays them out.
    Directory(PathBuf),
    /// One of its engines is asked.
    Engine,
}

impl From<PathBuf> for TokenizerSource {
    fn from(path: PathBuf) -> Self {
        if path.as_os_str() == "engine" { Self::Engine } else { Self::Directory(path) }
    }
}

/// What is configured for one name: `"gpt-4o" = "qwen3-32b"`, or a table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct NameConfig {
    /// The name that it stands for; itself if `None`.
    pub(crate) model: Option<String>,
    /// Names to try when no worker is ready, in order.
    pub(crate) fallbacks: Vec<String>,
    /// Where the tokens of its prompts come from.
    pub(crate) tokenizer: Option<TokenizerSource>,
}

impl<'de> Deserialize<'de> for NameConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Table {
            model: Option<String>,
            #[serde(default)]
            fallbacks: Vec<String>,
            tokenizer: Option<TokenizerSource>,
        }

        struct NameVisitor;

        impl<'de> Visitor<'de> for NameVisitor {
            type Value = NameConfig;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a model, or a table of model, fallbacks and tokenizer")
            }

            fn visit_str<E>(self, model: &str) -> Result<NameConfig, E> {
                Ok(NameConfig { model: Some(model.to_owned()), ..NameConfig::default() })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<NameConfig, A::Error> {
                let Table { model, fallbacks, tokenizer } = Table::deserialize(MapAccessDeserializer::new(map))?;
                Ok(NameConfig { model, fallbacks, tokenizer })
            }
        }

        deserializer.deserialize_any(NameVisitor)
    }
}

/// Names that cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum NamesError {
    #[error("models: {} is a circle; let one of these names stand for a model", .names.join(" -> "))]
    Circle { names: Vec<String> },
    #[error("models.{name:?} has {count} fallbacks; use at most {MAX_FALLBACKS}")]
    TooMany { name: String, count: usize },
    #[error("models: a name is empty; name a model")]
    Empty,
    #[error("models.{name:?} is {model:?} and has itself as a fallback; remove it")]
    Itself { name: String, model: String },
    #[error("models.{name:?} stands for {model:?} and has a tokenizer; give the tokenizer to {model:?}")]
    TokenizerOfAlias { name: String, model: String },
}

/// The configured names, each with all that may serve it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ModelNames {
    /// Real names to try for a configured name, in order. The first is what the name stands for.
    orders: BTreeMap<String, Vec<String>>,
}

impl ModelNames {
    /// Follows aliases to their ends.
    ///
    /// # Errors
    /// If some never end.
    pub(crate) fn new(configured: &BTreeMap<String, NameConfig>) -> Result<Self, NamesError> {
        let mut orders = BTreeMap::new();
        for (name, config) in configured {
            if config.fallbacks.len() > MAX_FALLBACKS {
                return Err(NamesError::TooMany { name: name.clone(), count: config.fallbacks.len() });
            }
            if let (Some(model), Some(_)) = (config.model.as_ref().filter(|model| *model != name), &config.tokenizer) {
                return Err(NamesError::TokenizerOfAlias { name: name.clone(), model: model.clone() });
            }
            let mut steps = vec![name];
            follow(configured, &mut steps)?;
            let mut order = vec![steps[steps.len() - 1].clone()];
            // What stands at the name itself comes before what stands at those that it stands for.
            for step in &steps {
                for fallback in configured.get(*step).map_or(&[][..], |config| &config.fallbacks) {
                    let mut steps = vec![fallback];
                    follow(configured, &mut steps)?;
                    let model = steps[steps.len() - 1];
                    if *model == order[0] {
                        return Err(NamesError::Itself { name: name.clone(), model: model.clone() });
                    }
                    if !order.contains(model) {
                        order.push(model.clone());
                    }
                }
            }
            orders.insert(name.clone(), order);
        }
        Ok(Self { orders })
    }

    /// Configured names, each with the real names that may serve it, in order.
    pub(crate) fn orders(&self) -> impl Iterator<Item = (&str, &[String])> {
        self.orders.iter().map(|(name, order)| (name.as_str(), order.as_slice()))
    }

    /// Names that others stand for or fall back to, and that are not configured themselves.
    pub(crate) fn targets(&self) -> impl Iterator<Item = (&str, &str)> {
        self.orders.iter().flat_map(|(name, order)| order.iter().map(move |target| (name.as_str(), target.as_str())))
    }
}

/// Follows aliases from the last of `steps` to a name that is none.
fn follow<'a>(configured: &'a BTreeMap<String, NameConfig>, steps: &mut Vec<&'a String>) -> Result<(), NamesError> {
    loop {
        let name = steps[steps.len() - 1];
        if name.is_empty() {
            return Err(NamesError::Empty);
        }
        let Some(next) = configured.get(name).and_then(|config| config.model.as_ref()).filter(|next| *next != name) else {
            return Ok(());
        };
        let is_circle = steps.contains(&next);
        steps.push(next);
        if is_circle {
            return Err(NamesError::Circle { names: steps.iter().map(|&name| name.clone()).collect() });
        }
    }
}

/// What a name that engines list is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Listing {
    /// Base models: `None` for a model of this name, `Some` for an adapter of this name on that model.
    bases: Vec<Option<String>>,
    max_model_len: Option<u32>,
}

/// All that engines list.
#[derive(Clone, Debug, Default)]
pub(crate) struct Listings(HashMap<String, Listing>);

impl Listings {
    /// Longest context that is stated for a model or an adapter.
    pub(crate) fn max_model_len(&self, name: &str) -> Option<u32> {
        self.0.get(name)?.max_model_len
    }

    /// Takes down a model, or an adapter of `parent`. Of several engines' bounds the least holds for all.
    pub(crate) fn add(&mut self, name: &str, parent: Option<&str>, max_model_len: Option<u32>) {
        if !self.0.contains_key(name) {
            self.0.insert(name.to_owned(), Listing::default());
        }
        let Some(listing) = self.0.get_mut(name) else { return };
        if !listing.bases.iter().any(|base| base.as_deref() == parent) {
            listing.bases.push(parent.map(str::to_owned));
            // A model of this name before adapters, and those in an order of their own: the same on every host.
            listing.bases.sort();
        }
        listing.max_model_len = match (listing.max_model_len, max_model_len) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
    }
}

/// What a request is served as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Resolved {
    /// The name that engines know it by: the adapter's, else the model's.
    pub(crate) name: String,
    /// The model whose workers serve it.
    pub(crate) model: String,
    /// The adapter that they must have loaded.
    pub(crate) adapter: Option<String>,
    /// Whether it is another than what was asked for, since that has no worker that is ready.
    pub(crate) is_fallback: bool,
}

/// Finds what a name is served as: the first of its names that has a worker that is ready; if none has, the first that
/// some engine lists. `None`: no engine lists any of them.
pub(crate) fn resolve(
    asked: &str,
    names: &ModelNames,
    listings: &Listings,
    is_ready: impl Fn(&str, Option<&str>) -> bool,
) -> Option<Resolved> {
    let itself = [asked.to_owned()];
    let order = names.orders.get(asked).map_or(&itself[..], Vec::as_slice);
    let mut known = None;
    for (place, name) in order.iter().enumerate() {
        let Some(listing) = listings.0.get(name) else { continue };
        for base in &listing.bases {
            let resolved = || Resolved {
                name: name.clone(),
                model: base.as_deref().unwrap_or(name).to_owned(),
                adapter: base.as_ref().map(|_| name.clone()),
                is_fallback: place > 0,
            };
            if is_ready(base.as_deref().unwrap_or(name), base.as_ref().map(|_| name.as_str())) {
                return Some(resolved());
            }
            known = known.or_else(|| Some(resolved()));
        }
    }
    known
}

/// A model as clients see it in `GET /v1/models`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ListedModel {
    /// Name that requests use.
    pub(crate) id: String,
    /// Of an alias: the name that it stands for.
    pub(crate) root: Option<String>,
    /// Of an adapter: its base model.
    pub(crate) parent: Option<String>,
    /// Longest context in tokens, if engines state it.
    pub(crate) max_model_len: Option<u32>,
}

/// All that can be asked for, by name: models, adapters, and configured names of which some model is listed.
pub(crate) fn listed(names: &ModelNames, listings: &Listings) -> Vec<ListedModel> {
    let card = |id: &str, root: Option<&str>, listing: &Listing| ListedModel {
        id: id.to_owned(),
        root: root.map(str::to_owned),
        parent: listing.bases.first().cloned().flatten(),
        max_model_len: listing.max_model_len,
    };
    let mut all: BTreeMap<&str, ListedModel> =
        listings.0.iter().map(|(name, listing)| (name.as_str(), card(name, None, listing))).collect();
    for (name, order) in names.orders() {
        if let Some((root, listing)) = order.iter().find_map(|root| Some((root, listings.0.get(root)?))) {
            all.insert(name, card(name, Some(root.as_str()).filter(|root| *root != name), listing));
        }
    }
    all.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Result<ModelNames, NamesError> {
        ModelNames::new(&toml::from_str(text).unwrap())
    }

    fn listings(of: &[(&str, Option<&str>)]) -> Listings {
        let mut listings = Listings::default();
        of.iter().for_each(|(name, parent)| listings.add(name, *parent, None));
        listings
    }

    #[track_caller]
    fn check(asked: &str, names: &ModelNames, served: &Listings, ready: &[&str], expected: Option<(&str, &str, bool)>) {
        let resolved = resolve(asked, names, served, |model, adapter| ready.contains(&adapter.unwrap_or(model)));
        let found = resolved.as_ref().map(|it| (it.name.as_str(), it.model.as_str(), it.is_fallback));
        assert_eq!(found, expected, "{asked}");
    }

    #[test]
    fn a_name_that_is_not_configured_is_itself_and_an_adapter_is_on_its_base() {
        let served = listings(&[("qwen", None), ("sql", Some("qwen"))]);
        let none = ModelNames::default();
        check("qwen", &none, &served, &["qwen"], Some(("qwen", "qwen", false)));
        check("sql", &none, &served, &["qwen", "sql"], Some(("sql", "qwen", false)));
        check("sql", &none, &served, &["qwen"], Some(("sql", "qwen", false)));
        check("gpt", &none, &served, &["qwen"], None);
        let resolved = resolve("sql", &none, &served, |_, adapter| adapter == Some("sql")).unwrap();
        assert_eq!(resolved.adapter.as_deref(), Some("sql"));
    }

    #[test]
    fn aliases_are_followed_and_fallbacks_are_tried_in_order() {
        let names = names(
            "a = 'b'\nb = { model = 'qwen', fallbacks = ['llama', 'sql'] }\nqwen = { fallbacks = ['phi'] }\nother = 'nowhere'",
        )
        .unwrap();
        let served = listings(&[("qwen", None), ("llama", None), ("phi", None), ("sql", Some("llama"))]);
        check("a", &names, &served, &["qwen", "llama"], Some(("qwen", "qwen", false)));
        check("a", &names, &served, &["phi", "llama"], Some(("llama", "llama", true)));
        check("a", &names, &served, &["phi", "sql"], Some(("sql", "llama", true)));
        check("a", &names, &served, &["phi"], Some(("phi", "phi", true)));
        check("qwen", &names, &served, &["llama", "phi"], Some(("phi", "phi", true)));
        // Nobody is ready: it is what it stands for.
        check("a", &names, &served, &[], Some(("qwen", "qwen", false)));
        check("other", &names, &served, &["qwen"], None);
    }

    #[test]
    fn a_fallback_serves_for_a_model_that_no_engine_lists() {
        let names = names("gone = { fallbacks = ['qwen'] }").unwrap();
        check("gone", &names, &listings(&[("qwen", None)]), &["qwen"], Some(("qwen", "qwen", true)));
    }

    #[test]
    fn an_adapter_on_two_bases_is_served_where_it_is_ready() {
        let served = listings(&[("b", None), ("a", None), ("sql", Some("b")), ("sql", Some("a"))]);
        let on = |base: &'static str| move |model: &str, _: Option<&str>| model == base;
        let none = ModelNames::default();
        assert_eq!(resolve("sql", &none, &served, on("b")).unwrap().model, "b");
        assert_eq!(resolve("sql", &none, &served, on("a")).unwrap().model, "a");
    }

    #[test]
    fn names_that_never_end_are_refused() {
        let refused = |text: &str| names(text).unwrap_err().to_string();
        assert!(refused("a = 'b'\nb = 'c'\nc = 'b'").contains("a -> b -> c -> b is a circle"));
        assert!(refused("a = { model = 'm', fallbacks = ['b'] }\nb = 'c'\nc = 'b'").contains("is a circle"));
        assert!(refused("a = { model = 'm', fallbacks = ['b'] }\nb = 'm'").contains("has itself as a fallback"));
        assert!(refused("a = ''").contains("empty"));
        assert!(refused("a = { model = 'm', tokenizer = 'd' }").contains("give the tokenizer to \"m\""));
        names("a = 'a'").unwrap();
    }

    #[test]
    fn a_wrong_entry_says_what_is_accepted() {
        let wrong = |text: &str| toml::from_str::<BTreeMap<String, NameConfig>>(text).unwrap_err().to_string();
        assert!(wrong("a = 3").contains("the name of a model, or a table"));
        assert!(wrong("[a]\nfallback = ['x']").contains("fallbacks"));
    }

    #[test]
    fn what_can_be_asked_for_is_listed_with_what_it_is() {
        let names = names("gpt = 'qwen'\nqwen = { fallbacks = ['llama'] }\nno = 'where'").unwrap();
        let mut served = listings(&[("sql", Some("qwen"))]);
        served.add("qwen", None, Some(4096));
        served.add("qwen", None, Some(2048));
        served.add("qwen", None, None);
        let listed = listed(&names, &served);
        let listed: Vec<_> =
            listed.iter().map(|it| (it.id.as_str(), it.root.as_deref(), it.parent.as_deref(), it.max_model_len)).collect();
        assert_eq!(
            listed,
            [("gpt", Some("qwen"), None, Some(2048)), ("qwen", None, None, Some(2048)), ("sql", None, Some("qwen"), None)]
        );
    }
}
