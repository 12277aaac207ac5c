//! Search by name, with one wording for unknown names.

use std::fmt;

use super::entry::{Entry, Kind, Registered};
use super::nearest::{distance, is_slip, nearest};

/// A name that no method has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownName {
    /// Requested kind; none if any kind was accepted.
    pub kind: Option<Kind>,
    /// The name.
    pub name: String,
    /// Most similar known name and its kind.
    pub nearest: Option<(Kind, String)>,
    /// Known names of the kind, separated by commas.
    pub known: String,
}

impl fmt::Display for UnknownName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Some(kind) => write!(f, "no {kind} is named \"{}\"", self.name)?,
            None => write!(f, "no method is named \"{}\"", self.name)?,
        }
        match &self.nearest {
            Some((kind, name)) if self.kind == Some(*kind) => write!(f, " (did you mean \"{name}\"?)")?,
            Some((kind, name)) => write!(f, " (did you mean the {kind} \"{name}\"?)")?,
            None => {}
        }
        if self.known.is_empty() { Ok(()) } else { write!(f, "; known: {}", self.known) }
    }
}

impl std::error::Error for UnknownName {}

impl UnknownName {
    /// Uses the most similar name of other kinds if it is nearer than those of its own.
    pub fn or_of<'a>(self, others: impl IntoIterator<Item = &'a Entry>) -> Self {
        let own = self.nearest.as_ref().map_or(usize::MAX, |(_, near)| distance(&self.name, near));
        let other = others
            .into_iter()
            .map(|entry| (distance(&self.name, entry.name), entry))
            .filter(|(edits, entry)| is_slip(*edits, entry.name))
            .min_by_key(|(edits, _)| *edits);
        match other {
            Some((edits, entry)) if edits < own => Self { nearest: Some((entry.kind, entry.name.to_string())), ..self },
            _ => self,
        }
    }
}

/// Element of a list with this name.
pub fn find<'a, R: Registered>(
    kind: Kind,
    list: impl IntoIterator<Item = &'a R> + Clone,
    name: &str,
) -> Result<&'a R, UnknownName> {
    list.clone().into_iter().find(|known| known.entry().name == name).ok_or_else(|| {
        let names: Vec<&str> = list.into_iter().map(|known| known.entry().name).collect();
        UnknownName {
            kind: Some(kind),
            name: name.to_string(),
            nearest: nearest(name, names.iter().copied()).map(|near| (kind, near.to_string())),
            known: names.join(", "),
        }
    })
}

/// Entries of any kind with this name, at least one.
pub fn find_any<'a>(
    entries: impl IntoIterator<Item = &'a Entry> + Clone,
    name: &str,
) -> Result<Vec<&'a Entry>, UnknownName> {
    let found: Vec<&Entry> = entries.clone().into_iter().filter(|entry| entry.name == name).collect();
    if !found.is_empty() {
        return Ok(found);
    }
    let unknown = UnknownName { kind: None, name: name.to_string(), nearest: None, known: String::new() };
    Err(unknown.or_of(entries))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIMIZERS: &[Entry] =
        &[Entry::plain(Kind::Optimizer, "galore", ""), Entry::plain(Kind::Optimizer, "dct-adamw", "")];
    const RULES: &[Entry] = &[Entry::plain(Kind::Rule, "lora-pro", "")];

    #[test]
    fn unknown_names_get_the_nearest_of_their_kind_or_of_another() {
        assert_eq!(find(Kind::Optimizer, OPTIMIZERS, "galore").unwrap().name, "galore");
        let slip = find(Kind::Optimizer, OPTIMIZERS, "galroe").unwrap_err();
        let text = "no optimizer is named \"galroe\" (did you mean \"galore\"?); known: galore, dct-adamw";
        assert_eq!(slip.clone().or_of(RULES).to_string(), text);
        let other = find(Kind::Optimizer, OPTIMIZERS, "lora-pro").unwrap_err().or_of(RULES).to_string();
        assert!(other.contains("did you mean the training rule \"lora-pro\"?"), "{other}");
        let far = find(Kind::Optimizer, OPTIMIZERS, "something").unwrap_err().or_of(RULES).to_string();
        assert!(!far.contains("did you mean"), "{far}");
    }

    #[test]
    fn a_search_through_all_kinds_says_which_kind_the_nearest_is() {
        let all = || OPTIMIZERS.iter().chain(RULES);
        assert_eq!(find_any(all(), "lora-pro").unwrap()[0].kind, Kind::Rule);
        let text = "no method is named \"lora-por\" (did you mean the training rule \"lora-pro\"?)";
        assert_eq!(find_any(all(), "lora-por").unwrap_err().to_string(), text);
    }
}
