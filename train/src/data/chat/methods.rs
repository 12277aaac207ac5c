//! Methods and filters of texts in templates, as Python and Jinja have them.

use minijinja::value::Kwargs;
use minijinja::{Error, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::python::indentation;

/// A method of a value, as Python has it.
pub(super) fn method(state: &mut State, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        return unknown_method_callback(state, value, name, arguments);
    };
    let given = |place: usize| arguments.get(place).and_then(Value::as_str);
    Ok(match (name, arguments.len()) {
        ("title", 0) => titled(text).into(),
        ("swapcase", 0) => swapped(text).into(),
        ("removeprefix", 1) => given(0).and_then(|start| text.strip_prefix(start)).unwrap_or(text).into(),
        ("removesuffix", 1) => given(0).and_then(|end| text.strip_suffix(end)).unwrap_or(text).into(),
        ("partition", 1) if given(0).is_some_and(|middle| !middle.is_empty()) => {
            let middle = given(0).unwrap_or_default();
            match text.split_once(middle) {
                Some((before, after)) => texts([before, middle, after]),
                None => texts([text, "", ""]),
            }
        }
        ("rsplit", 1 | 2) if given(0).is_some_and(|middle| !middle.is_empty()) => {
            let middle = given(0).unwrap_or_default();
            let most = arguments.get(1).and_then(|most| i64::try_from(most.clone()).ok()).unwrap_or(-1);
            let mut parts: Vec<&str> = match usize::try_from(most) {
                Ok(most) => text.rsplitn(most + 1, middle).collect(),
                Err(_) => text.rsplit(middle).collect(),
            };
            parts.reverse();
            texts(parts)
        }
        _ => return unknown_method_callback(state, value, name, arguments),
    })
}

fn texts<'a>(parts: impl IntoIterator<Item = &'a str>) -> Value {
    parts.into_iter().map(str::to_string).collect::<Vec<_>>().into()
}

/// Letters after anything but a letter in upper case, all others in lower case.
fn titled(text: &str) -> String {
    let (mut out, mut within) = (String::with_capacity(text.len()), false);
    for c in text.chars() {
        match within {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
        within = c.is_alphabetic();
    }
    out
}

fn swapped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_uppercase() {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
    }
    out
}

/// Filter `indent` of Jinja: lines after the first are indented, empty ones only on request; line breaks at the end stay.
pub(super) fn indent(
    text: String,
    width: Option<Value>,
    first: Option<bool>,
    blank: Option<bool>,
    options: Kwargs,
) -> Result<String, Error> {
    let width = match width {
        Some(width) => Some(width),
        None => options.get::<Option<Value>>("width")?,
    };
    let flag = |given: Option<bool>, name: &str| match given {
        Some(given) => Ok(given),
        None => Ok::<_, Error>(options.get::<Option<bool>>(name)?.unwrap_or(false)),
    };
    let (first, blank) = (flag(first, "first")?, flag(blank, "blank")?);
    options.assert_all_used()?;
    let space = indentation(&width.unwrap_or(Value::from(4)));
    let mut out = String::new();
    for (number, line) in text.split('\n').enumerate() {
        if number > 0 {
            out.push('\n');
        }
        let indented = if number == 0 { first } else { blank || !line.is_empty() };
        if indented {
            out.push_str(&space);
        }
        out.push_str(line);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_have_the_case_that_python_gives_them() {
        assert_eq!(titled("be <brief> & 'good' it's 3d ÉTÉ"), "Be <Brief> & 'Good' It'S 3D Été");
        assert_eq!(swapped("bE É"), "Be é");
    }
}
