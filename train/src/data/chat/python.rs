//! Template values as Python writes them: `json.dumps`, `repr` and `strftime`.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, Value, escape_formatter};

/// Filter `tojson` of `transformers`: `json.dumps` with `ensure_ascii=False`, without escaping for HTML.
pub(super) fn tojson(value: &Value, ascii: Option<bool>, options: Kwargs) -> Result<String, Error> {
    let ascii = match ascii {
        Some(ascii) => ascii,
        None => options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    let indent: Option<Value> = options.get("indent")?;
    let indent = indent.filter(|indent| !indent.is_none()).map(|indent| indentation(&indent));
    let separators: Option<Vec<String>> = options.get("separators")?;
    let [item, key] = match separators.as_deref() {
        None if indent.is_some() => [",", ": "].map(String::from),
        None => [", ", ": "].map(String::from),
        Some([item, key]) => [item.clone(), key.clone()],
        Some(_) => return Err(wrong("tojson: separators must be two texts")),
    };
    let sorted = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let mut dump = Dump { ascii, indent, item, key, sorted, out: String::new() };
    dump.value(value, 0)?;
    Ok(dump.out)
}

/// Maximum indent in spaces.
const MOST_INDENT: usize = 64;
/// Maximum length of a value's text in bytes: values that share their parts can be far longer than what holds them.
const MOST_TEXT: usize = 1 << 24;
/// Python's sequences have a length and items, texts and dictionaries too.
pub fn is_sequence(value: &Value) -> bool {
    match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::String => true,
        ValueKind::Iterable => value.len().is_some(),
        _ => false,
    }
}

/// Maximum nesting of values; `serde_json` has the same limit.
const DEPTH: usize = 128;

/// One level of indentation: the text itself, or that many spaces.
pub(super) fn indentation(width: &Value) -> String {
    match width.as_str() {
        Some(text) => text.to_string(),
        None => " ".repeat(width.as_usize().unwrap_or(0).min(MOST_INDENT)),
    }
}

fn wrong(problem: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, problem.into())
}

struct Dump {
    ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sorted: bool,
    out: String,
}

impl Dump {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH {
            return Err(wrong("tojson: values are nested too deeply"));
        }
        if self.out.len() > MOST_TEXT {
            return Err(wrong("tojson: the text is too long"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number(value, ["NaN", "Infinity"])),
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.parts('[', items.len(), depth, |dump, place| dump.value(&items[place], depth + 1))?;
                self.out.push(']');
            }
            ValueKind::Map => {
                let mut entries = Vec::new();
                for key in value.try_iter()? {
                    entries.push((key_text(&key)?, value.get_item(&key)?));
                }
                if self.sorted {
                    entries.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.parts('{', entries.len(), depth, |dump, place| {
                    let (key, value) = &entries[place];
                    dump.text(key);
                    dump.out.push_str(&dump.key.clone());
                    dump.value(value, depth + 1)
                })?;
                self.out.push('}');
            }
            other => return Err(wrong(format!("tojson: a value of the kind {other} is no JSON"))),
        }
        Ok(())
    }

    fn parts(
        &mut self,
        open: char,
        count: usize,
        depth: usize,
        mut write: impl FnMut(&mut Self, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for place in 0..count {
            if place > 0 {
                self.out.push_str(&self.item.clone());
            }
            self.line(depth + 1);
            write(self, place)?;
        }
        if count > 0 {
            self.line(depth);
        }
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' => self.out.push_str(&format!("\\u{:04x}", c as u32)),
                c if self.ascii && !(' '..='~').contains(&c) => {
                    let mut units = [0; 2];
                    c.encode_utf16(&mut units).iter().for_each(|unit| self.out.push_str(&format!("\\u{unit:04x}")));
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_string()),
        ValueKind::Number => Ok(number(key, ["NaN", "Infinity"])),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_string()),
        ValueKind::None => Ok("null".into()),
        other => Err(wrong(format!("tojson: a key of the kind {other} is no JSON"))),
    }
}

/// Formats a number like Python's `repr`, with these words for non-finite values.
fn number(value: &Value, [nan, infinity]: [&str; 2]) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(x) = f64::try_from(value.clone()) else { return value.to_string() };
    if x.is_nan() {
        return nan.into();
    }
    if x.is_infinite() {
        return format!("{}{infinity}", if x < 0.0 { "-" } else { "" });
    }
    // The shortest digits that round-trip; Python switches to powers of ten below 1e-4 and from 1e16 on.
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x == 0.0 || (-4..16).contains(&exponent) {
        let text = x.to_string();
        return if text.contains('.') { text } else { text + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// Writes a value into the output as Python's `str` does.
pub(super) fn write(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    let shown = match value.kind() {
        ValueKind::Number => number(value, ["nan", "inf"]),
        ValueKind::Seq | ValueKind::Map => repr(value, 0)?,
        _ => return escape_formatter(out, state, value),
    };
    escape_formatter(out, state, &Value::from(shown))
}

fn repr(value: &Value, depth: usize) -> Result<String, Error> {
    if depth > DEPTH {
        return Err(wrong("values are nested too deeply"));
    }
    let mut length = 0;
    Ok(match value.kind() {
        ValueKind::Number => number(value, ["nan", "inf"]),
        ValueKind::String => repr_text(value.as_str().unwrap_or_default()),
        ValueKind::Seq => {
            let mut items = Vec::new();
            for item in value.try_iter()? {
                items.push(within(repr(&item, depth + 1)?, &mut length)?);
            }
            match (value.is_tuple(), items.as_slice()) {
                (true, [one]) => format!("({one},)"),
                (true, _) => format!("({})", items.join(", ")),
                _ => format!("[{}]", items.join(", ")),
            }
        }
        ValueKind::Map => {
            let mut entries = Vec::new();
            for key in value.try_iter()? {
                let entry = format!("{}: {}", repr(&key, depth + 1)?, repr(&value.get_item(&key)?, depth + 1)?);
                entries.push(within(entry, &mut length)?);
            }
            format!("{{{}}}", entries.join(", "))
        }
        _ => value.to_string(),
    })
}

/// A part of a text, which is added to its length. Rejects a text that is too long.
fn within(part: String, length: &mut usize) -> Result<String, Error> {
    *length += part.len();
    match *length > MOST_TEXT {
        true => Err(wrong("the text of a value is too long")),
        false => Ok(part),
    }
}

fn repr_text(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if c.is_ascii_control() => out.push_str(&format!("\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Formats the current time with a format of `strftime`, in UTC.
pub(super) fn strftime_now(format: &str) -> Result<String, Error> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    strftime(format, seconds)
}

fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    let (days, clock) = ((seconds / 86_400) as i64, seconds % 86_400);
    let (hour, minute, second) = (clock / 3600, clock / 60 % 60, clock % 60);
    // "Euclidean affine functions and their application to calendar algorithms" (Neri and Schneider, 2022), in its plain form.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days + 4).rem_euclid(7) as usize]);
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let lengths = [31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let day_of_year = lengths[..month as usize - 1].iter().sum::<i64>() + day;

    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut kind = rest.next();
        let padded = kind != Some('-');
        if !padded {
            kind = rest.next();
        }
        let digits = |value: i64, width: usize| match padded {
            true => format!("{value:0width$}"),
            false => value.to_string(),
        };
        out += &match kind {
            Some('d') => digits(day, 2),
            Some('m') => digits(month, 2),
            Some('Y') => year.to_string(),
            Some('y') => digits(year % 100, 2),
            Some('H') => digits(hour as i64, 2),
            Some('I') => digits((hour as i64 + 11) % 12 + 1, 2),
            Some('M') => digits(minute as i64, 2),
            Some('S') => digits(second as i64, 2),
            Some('j') => digits(day_of_year, 3),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('B') => month_name.into(),
            Some('b') => month_name[..3].into(),
            Some('A') => day_name.into(),
            Some('a') => day_name[..3].into(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('%') => "%".into(),
            other => {
                let other = other.map_or(String::new(), String::from);
                return Err(wrong(format!("strftime_now: %{other} is not supported; d, m, Y, H, M and S are")));
            }
        };
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_python_writes_them() {
        for (x, text) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e-5, "1.5e-05"),
            (0.0001, "0.0001"),
            (-2.5e300, "-2.5e+300"),
            (0.0, "0.0"),
        ] {
            assert_eq!(number(&Value::from(x), ["NaN", "Infinity"]), text);
        }
        assert_eq!(number(&Value::from(7), ["NaN", "Infinity"]), "7");
    }

    #[test]
    fn dates_follow_the_calendar() {
        for (seconds, text) in [
            (0, "Thu 01 Jan 1970 00:00:00 001"),
            (951_782_400, "Tue 29 Feb 2000 00:00:00 060"),
            (1_735_689_599, "Tue 31 Dec 2024 23:59:59 366"),
            (1_785_585_600, "Sat 01 Aug 2026 12:00:00 213"),
        ] {
            assert_eq!(strftime("%a %d %b %Y %H:%M:%S %j", seconds).unwrap(), text);
        }
        assert_eq!(strftime("%-d %B %y %I%p%%", 951_782_400).unwrap(), "29 February 00 12AM%");
        assert!(strftime("%Q", 0).is_err());
    }

    #[test]
    fn texts_are_quoted_as_python_quotes_them() {
        assert_eq!(repr_text("a'b\n"), "\"a'b\\n\"");
        assert_eq!(repr_text("a'b\""), "'a\\'b\"'");
        assert_eq!(repr_text("ä"), "'ä'");
    }
}
