//! Whether a template wants the content of a message as one text, or goes through its parts itself.
//!
//! vLLM looks for a loop over a message's content in the template's syntax tree; this follows the same rules over the
//! template's tags: which names are `messages` or parts of it, which are messages, and whether something loops over the
//! content of one, or over anything called `content`, also where a macro is given it.

/// Whether a template loops over contents.
pub(super) fn takes_parts(source: &str) -> bool {
    let tags = tags(source);
    let mut lists = vec!["messages".to_owned()];
    // Names are often assigned in turn; what is assigned before it is known is found in the next round.
    for _ in 0..4 {
        for (name, value) in tags.iter().filter_map(|tag| assigned(tag)) {
            if lists.iter().any(|list| is_of(value, list, None)) && !lists.iter().any(|list| list == name) {
                lists.push(name.to_owned());
            }
        }
    }
    let loops: Vec<(&str, &str)> = tags.iter().filter_map(|tag| looped(tag)).collect();
    let messages: Vec<&str> =
        loops.iter().filter(|(_, over)| lists.iter().any(|list| is_of(over, list, None))).map(|(name, _)| *name).collect();
    let is_content = |value: &str| messages.iter().any(|message| is_of(value, message, Some("content")));
    let macros = tags.iter().filter_map(|tag| tag.strip_prefix("macro ")?.split_once('('));
    let given: Vec<&str> =
        macros.flat_map(|(name, parameters)| given_contents(source, name.trim(), parameters, &is_content)).collect();
    loops.iter().any(|(_, over)| is_content(over) || word(over) == over.trim() && (*over == "content" || given.contains(over)))
}

/// What is within `{% %}`.
fn tags(source: &str) -> Vec<&str> {
    source
        .split("{%")
        .skip(1)
        .filter_map(|rest| rest.split_once("%}"))
        .map(|(tag, _)| tag.trim_matches(['-', '+']).trim())
        .collect()
}

/// `set NAME = VALUE`
fn assigned(tag: &str) -> Option<(&str, &str)> {
    let (name, value) = tag.strip_prefix("set ")?.split_once('=')?;
    Some((name.trim(), value.trim()))
}

/// `for NAME in VALUE`
fn looped(tag: &str) -> Option<(&str, &str)> {
    let (name, value) = tag.strip_prefix("for ")?.split_once(" in ")?;
    let value = [" if ", " recursive"].iter().fold(value, |value, end| value.split(end).next().unwrap_or(value));
    Some((name.trim(), value.trim()))
}

/// Whether a value is `name` (or its member `key`), whole, sliced or filtered.
fn is_of(value: &str, name: &str, key: Option<&str>) -> bool {
    let Some(mut rest) = value.trim().strip_prefix(name) else { return false };
    if let Some(key) = key {
        let ways = [format!(".{key}"), format!("['{key}']"), format!("[\"{key}\"]")];
        let Some(after) = ways.iter().find_map(|way| rest.strip_prefix(way.as_str())) else { return false };
        rest = after;
    }
    let rest = rest.trim_start();
    let is_slice = rest.starts_with('[') && rest.split(']').next().is_some_and(|inner| inner.contains(':'));
    rest.is_empty() || is_slice || rest.starts_with('|') || rest.starts_with("is ")
}

/// Parameters of a macro that are given a message's content somewhere.
fn given_contents<'a>(source: &str, name: &str, parameters: &'a str, is_content: &impl Fn(&str) -> bool) -> Vec<&'a str> {
    let parameters: Vec<&str> = parameters.trim_end_matches([')', ' ']).split(',').map(|one| word(one.trim())).collect();
    let call = format!("{name}(");
    let mut given = Vec::new();
    for (at, _) in source.match_indices(&call) {
        let arguments = source[at + call.len()..].split([')', '}']).next().unwrap_or_default();
        for (place, argument) in arguments.split(',').enumerate() {
            let named = argument.split_once('=').filter(|(_, value)| is_content(value));
            let parameter = match named {
                Some((parameter, _)) => parameters.iter().find(|known| **known == parameter.trim()),
                None => parameters.get(place).filter(|_| is_content(argument)),
            };
            given.extend(parameter.copied());
        }
    }
    given
}

/// The name that a text begins with.
fn word(text: &str) -> &str {
    text.split(|letter: char| !letter.is_alphanumeric() && letter != '_').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_that_loop_over_contents_take_parts() {
        for source in [
            "{% for message in messages %}{% for part in message['content'] %}{% endfor %}{% endfor %}",
            "{%- for m in messages[1:] -%}{%- for c in m.content | selectattr('type', 'equalto', 'text') -%}",
            "{% set loop_messages = messages %}{% for message in loop_messages %}{% for item in message.content %}",
            "{% macro render(body) %}{% for item in body %}{% endfor %}{% endmacro %}{% for m in messages %}{{ render(m.content) }}",
            "{% macro render(a, body=none) %}{% for item in body %}{% endfor %}{% endmacro %}{% for m in messages %}{{ render(1, body=m['content']) }}",
            "{% for message in messages %}{% set content = message.content %}{% for item in content %}",
        ] {
            assert!(takes_parts(source), "{source}");
        }
    }

    #[test]
    fn other_templates_want_one_text() {
        for source in [
            "{% for message in messages %}{{ message.content }}{% endfor %}",
            "{% for message in messages %}{% for tool_call in message.tool_calls %}{% endfor %}{% endfor %}",
            "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% for m in messages %}{{ m['content'] }}",
            "{% macro render(body) %}{% for item in body %}{% endfor %}{% endmacro %}{{ render(tools) }}",
        ] {
            assert!(!takes_parts(source), "{source}");
        }
    }
}
