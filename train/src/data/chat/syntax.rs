//! Rewrites the syntax of a template where the engine reads it otherwise than Jinja.

use std::borrow::Cow;

/// Template as the engine reads it, and true if it marks the assistant's text.
///
/// - `{% generation %}` blocks become calls of `__generation`.
/// - Escapes in texts that only Python has (`\U0001f600`, `\a`, `\v`, a line break) are replaced by what they mean, and
///   those that only the engine has (`\/`) are kept as they are.
/// - A default of a macro's argument that names another argument is assigned in the macro's body: the engine computes
///   defaults from the last one to the first.
///
/// Comments and raw blocks are copied.
pub(super) fn adapted(source: &str) -> Result<(String, bool), String> {
    let (mut out, mut rest, mut marks) = (String::with_capacity(source.len()), source, false);
    while let Some(begin) = opening(rest) {
        let (before, tag) = rest.split_at(begin);
        out.push_str(before);
        let open = &tag[..2];
        let end = match open {
            "{#" => tag.find("#}"),
            "{%" => closing(tag, "%}"),
            _ => closing(tag, "}}"),
        };
        let Some(end) = end else {
            // The engine says what is missing.
            rest = tag;
            break;
        };
        let inner = &tag[2..end];
        let mut length = end + 2;
        match (open, word(inner)) {
            ("{#", _) => out.push_str(&tag[..length]),
            ("{%", "raw") => {
                length = after_raw(&tag[length..]).map_or(tag.len(), |more| length + more);
                out.push_str(&tag[..length]);
            }
            ("{%", word @ ("generation" | "endgeneration")) => {
                marks = true;
                let call = if word == "generation" { " call __generation() " } else { " endcall " };
                out.push_str(&format!("{{%{}%}}", inner.replacen(word, call, 1)));
            }
            ("{%", _) => out.push_str(&block(&texts_of(inner)?)),
            _ => out.push_str(&format!("{{{{{}}}}}", texts_of(inner)?)),
        }
        rest = &tag[length..];
    }
    out.push_str(rest);
    Ok((out, marks))
}

/// Position of the next expression, block or comment.
fn opening(text: &str) -> Option<usize> {
    text.match_indices('{').map(|(at, _)| at).find(|at| matches!(text.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#')))
}

/// Position of the `end` of a tag, outside of texts and parentheses.
fn closing(tag: &str, end: &str) -> Option<usize> {
    outside(tag, 2).find(|at| tag.as_bytes()[*at..].starts_with(end.as_bytes()))
}

/// Positions from `first` on that are outside of texts and parentheses, up to a text without an end.
fn outside(text: &str, first: usize) -> impl Iterator<Item = usize> {
    let bytes = text.as_bytes();
    let (mut next, mut depth) = (first, 0usize);
    std::iter::from_fn(move || {
        loop {
            let (at, top) = (next, depth == 0);
            next += 1;
            match *bytes.get(at)? {
                quote @ (b'\'' | b'"') => next = end_of_text(bytes, at, quote)? + 1,
                b'(' | b'[' | b'{' => depth += 1,
                b')' | b']' | b'}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            if top {
                return Some(at);
            }
        }
    })
}

/// Position of the closing quote of the text that begins at `at`.
fn end_of_text(bytes: &[u8], at: usize, quote: u8) -> Option<usize> {
    let mut at = at + 1;
    while *bytes.get(at)? != quote {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    Some(at)
}

/// Inner text of a block without the signs for blanks.
fn word(inner: &str) -> &str {
    let trimmed = inner.strip_prefix(['-', '+']).unwrap_or(inner);
    trimmed.strip_suffix(['-', '+']).unwrap_or(trimmed).trim()
}

/// Length of what follows a raw block's opening, up to the end of its closing.
fn after_raw(text: &str) -> Option<usize> {
    text.match_indices("{%").find_map(|(at, _)| {
        let end = at + text[at..].find("%}")?;
        (word(text.get(at + 2..end)?) == "endraw").then_some(end + 2)
    })
}

/// An expression whose texts have no escapes that the engine reads otherwise.
fn texts_of(inner: &str) -> Result<Cow<'_, str>, String> {
    if !inner.contains('\\') {
        return Ok(inner.into());
    }
    let (mut out, mut chars, mut quote) = (String::with_capacity(inner.len()), inner.chars(), None);
    while let Some(c) = chars.next() {
        match (c, quote) {
            ('\\', Some(_)) => match chars.next() {
                Some('U') => {
                    let digits: String = chars.by_ref().take(8).collect();
                    let code = u32::from_str_radix(&digits, 16).ok().filter(|_| digits.len() == 8);
                    let named = code.and_then(char::from_u32);
                    let named =
                        named.ok_or_else(|| format!("\\U{digits} is no character: eight digits of one are needed"))?;
                    if named == '\\' || Some(named) == quote {
                        out.push('\\');
                    }
                    out.push(named);
                }
                Some('N') if chars.as_str().starts_with('{') => {
                    return Err("characters by name (\\N{..}) are not supported; write the character itself".into());
                }
                Some('a') => out.push('\u{7}'),
                Some('v') => out.push('\u{b}'),
                Some('/') => out.push_str("\\\\/"),
                Some('\n') => {}
                Some(other) => out.extend(['\\', other]),
                None => out.push('\\'),
            },
            ('\'' | '"', None) => {
                quote = Some(c);
                out.push(c);
            }
            _ => {
                if Some(c) == quote {
                    quote = None;
                }
                out.push(c);
            }
        }
    }
    Ok(out.into())
}

/// A block; the one that opens a macro is followed by the assignment of defaults that name arguments.
fn block(inner: &str) -> String {
    let plain = || format!("{{%{inner}%}}");
    let signature = word(inner).strip_prefix("macro").filter(|rest| rest.starts_with(char::is_whitespace));
    let Some((name, arguments)) = signature.and_then(|signature| signature.split_once('(')) else { return plain() };
    let Some(arguments) = arguments.trim_end().strip_suffix(')') else { return plain() };
    let arguments: Vec<(&str, Option<&str>)> = parts(arguments)
        .into_iter()
        .map(|argument| match argument.split_once('=') {
            Some((name, default)) => (name.trim(), Some(default.trim())),
            None => (argument.trim(), None),
        })
        .collect();
    let names_argument =
        |default: &&str| names(default).iter().any(|name| arguments.iter().any(|(argument, _)| argument == name));
    if !arguments.iter().any(|(_, default)| default.as_ref().is_some_and(names_argument)) {
        return plain();
    }
    let (begin, end) = (sign(inner.chars().next()), sign(inner.chars().next_back()));
    let list: Vec<&str> = arguments.iter().map(|(name, _)| *name).collect();
    let mut out = format!("{{%{begin} macro {}({}) {end}%}}", name.trim(), list.join(", "));
    for (name, default) in arguments.iter().filter_map(|(name, default)| Some((name, (*default)?))) {
        out.push_str(&format!("{{% set {name} = ({default}) if {name} is undefined else {name} {end}%}}"));
    }
    out
}

/// A sign for blanks at the edge of a block.
fn sign(edge: Option<char>) -> String {
    edge.filter(|edge| matches!(edge, '-' | '+')).map(String::from).unwrap_or_default()
}

/// Parts of a list between commas outside of texts and parentheses.
fn parts(list: &str) -> Vec<&str> {
    let (mut found, mut from) = (Vec::new(), 0);
    for at in outside(list, 0).filter(|at| list.as_bytes()[*at] == b',') {
        found.push(&list[from..at]);
        from = at + 1;
    }
    if !list[from..].trim().is_empty() {
        found.push(&list[from..]);
    }
    found
}

/// Names in an expression, without those of attributes and those in texts.
fn names(expression: &str) -> Vec<&str> {
    let bytes = expression.as_bytes();
    let part = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let (mut found, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        match bytes[at] {
            quote @ (b'\'' | b'"') => at = end_of_text(bytes, at, quote).map_or(bytes.len(), |end| end + 1),
            byte if part(byte) => {
                let from = at;
                while at < bytes.len() && part(bytes[at]) {
                    at += 1;
                }
                if from == 0 || bytes[from - 1] != b'.' {
                    found.push(&expression[from..at]);
                }
            }
            _ => at += 1,
        }
    }
    found
}
