//! Chat templates, rendered as Hugging Face's Transformers renders them.
//!
//! Contract: Jinja with blocks trimmed and stripped, loop controls, Python's methods of strings, lists and dictionaries, and
//! what Transformers adds: `tojson` as `json.dumps`, `raise_exception`, `strftime_now`, `{% generation %}`. Rendering is bounded
//! in steps. `strftime_now` tells UTC, as engines in containers do.

mod format;
mod time;

use std::{path::PathBuf, time::SystemTime};

use minijinja::{Environment, Error, ErrorKind, Value, syntax::SyntaxConfig, value::Kwargs};

use crate::{
    error::{PromptError, TokenizerError},
    json::{Style, dump},
};

/// Steps of one rendering; a chat of 1,000 messages takes some hundred thousand.
const MAX_STEPS: u64 = 5_000_000;

/// A model's templates.
#[derive(Debug)]
pub(crate) struct Templates {
    environment: Environment<'static>,
    known: Vec<ChatTemplate>,
}

/// One of a model's templates.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    name: String,
    /// Whether it goes through the parts of a message's content itself; else it wants one text.
    pub(crate) takes_parts: bool,
    /// Whether it knows the role `developer`.
    pub(crate) knows_developer: bool,
}

impl Templates {
    /// Of names, sources, and the files that they come from.
    pub(crate) fn new(sources: Vec<(String, String, PathBuf)>) -> Result<Self, TokenizerError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("Jinja's own delimiters are sound"));
        environment.set_fuel(Some(MAX_STEPS));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: &str| time::format(format, SystemTime::now()));
        let mut known = Vec::new();
        for (name, source, path) in sources {
            known.push(ChatTemplate {
                name: name.clone(),
                takes_parts: format::takes_parts(&source),
                knows_developer: source.contains("\"developer\"") || source.contains("'developer'"),
            });
            environment.add_template_owned(name.clone(), without_generation_marks(&source)).map_err(|error| {
                let line = error.line().map(|line| format!(", line {line}")).unwrap_or_default();
                TokenizerError::Malformed {
                    path,
                    reason: format!("chat template {name:?}{line}: {}", reason(&error)),
                    fix: "write a Jinja template, as Transformers reads it",
                }
            })?;
        }
        Ok(Self { environment, known })
    }

    /// The one that Transformers takes: `tool_use` for chats with tools where there is one, else `default`.
    pub(crate) fn choose(&self, has_tools: bool) -> Option<&ChatTemplate> {
        let named = |wanted: &str| self.known.iter().find(|template| template.name == wanted);
        named("tool_use").filter(|_| has_tools).or_else(|| named("default"))
    }

    /// Renders a chat.
    pub(crate) fn render(&self, template: &ChatTemplate, context: Value) -> Result<String, PromptError> {
        let rendered = self.environment.get_template(&template.name).and_then(|template| template.render(context));
        rendered.map_err(|error| PromptError::Template(reason(&error)))
    }
}

/// What went wrong, without a quotation of the template, or of what it was rendering.
fn reason(error: &Error) -> String {
    error.detail().map_or_else(|| error.kind().to_string(), |detail| format!("{}: {detail}", error.kind()))
}

/// `{% generation %}` marks what an assistant said, for training; here it is a block like any other.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let end = rest.find("%}").map_or(rest.len(), |end| end + 2);
        let tag = &rest[..end];
        let word = tag.trim_start_matches("{%").trim_end_matches("%}").trim_matches(['-', '+']).trim();
        match word {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = &rest[end..];
    }
    out + rest
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

fn to_json(value: &Value, ensure_ascii: Option<bool>, options: Kwargs) -> Result<String, Error> {
    let indent: Option<Value> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let style = Style {
        indent: indent.filter(|indent| !indent.is_none() && !indent.is_undefined()).map(usize::try_from).transpose()?,
        ensure_ascii: ensure_ascii.or(options.get("ensure_ascii")?).unwrap_or_default(),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or_default(),
        separators: separators.and_then(|all| <[String; 2]>::try_from(all).ok()).map(|[comma, colon]| (comma, colon)),
    };
    options.assert_all_used()?;
    dump(value, &style).ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "this cannot be written as JSON"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, context: Value) -> Result<String, PromptError> {
        let templates = Templates::new(vec![("default".to_owned(), source.to_owned(), PathBuf::new())]).unwrap();
        templates.render(templates.choose(false).unwrap(), context)
    }

    #[test]
    fn what_transformers_adds_to_jinja_is_there() {
        let context = || minijinja::context! { tool => Value::from_pairs([("b", Value::from("<é>")), ("a", Value::from(1.0))]), none => () };
        let check = |source: &str, expected: &str| assert_eq!(render(source, context()).unwrap(), expected, "{source}");
        check("{{ tool | tojson }}", r#"{"b": "<é>", "a": 1.0}"#);
        check("{{ tool | tojson(indent=4) }}", "{\n    \"b\": \"<é>\",\n    \"a\": 1.0\n}");
        check("{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}\ny\n", "x\ny");
        check("{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "13");
        check("a {%- generation -%} b {%- endgeneration %} c", "ab c");
        check("{{ ' x '.strip() + 'a,b'.split(',')[1] }}{{ none }}{{ true }}{{ missing }}", "xbNoneTrue");
        check("{{ strftime_now('%Y')|length }}{% if strftime_now is defined %}d{% endif %}", "4d");
        check("{% for k, v in tool.items() %}{{ k }}{% endfor %}{{ tool.get('z', 7) }}", "ba7");
        check("{% set ns = namespace(x=1) %}{% for i in [1,2] %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}", "4");
        check("{{ [1,2,3][::-1][0] }}{{ messages is undefined }}", "3True");
    }

    #[test]
    fn a_template_that_refuses_a_chat_says_why_and_one_that_never_ends_is_stopped() {
        let error = render("{{ raise_exception('roles must alternate') }}", Value::UNDEFINED).unwrap_err().to_string();
        assert!(error.contains("roles must alternate"), "{error}");
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}";
        let error = render(endless, Value::UNDEFINED).unwrap_err().to_string();
        assert!(error.contains("fuel"), "{error}");
    }

    #[test]
    fn a_template_that_is_none_is_refused_with_its_file_and_line() {
        let broken = vec![("default".to_owned(), "a\n{% for %}".to_owned(), PathBuf::from("chat_template.jinja"))];
        let error = Templates::new(broken).unwrap_err().to_string();
        assert!(error.contains("chat_template.jinja") && error.contains("line 2"), "{error}");
    }

    #[test]
    fn chats_with_tools_have_a_template_of_their_own_where_there_is_one() {
        let named = |name: &str| (name.to_owned(), name.to_owned(), PathBuf::new());
        let templates = Templates::new(vec![named("tool_use"), named("default")]).unwrap();
        let chosen = |has_tools| templates.choose(has_tools).map(|template| template.name.clone());
        assert_eq!((chosen(true).as_deref(), chosen(false).as_deref()), (Some("tool_use"), Some("default")));
        assert!(Templates::new(Vec::new()).unwrap().choose(true).is_none());
    }
}
