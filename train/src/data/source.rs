//! Documents from files and folders.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::io::Read;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::json::Json;
use super::json_lines::JsonLines;
use super::open::open;
use super::text::{PIECE, TextReader};
use super::{DataError, Document};

/// What the files of the data are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// By the end of the name: `.jsonl` and `.ndjson` are JSON lines, `.parquet` is Parquet, a folder of token files is that; `.json` is JSON lines
    /// where it begins with objects, all else text. `.gz` and `.zst` may follow.
    #[default]
    Auto,
    /// One document a file; several where a file is larger than 1 MiB.
    Text,
    /// One document a line, in a field of a JSON object.
    Jsonl,
    /// One document a row, in a column of text.
    Parquet,
    /// Token files made before.
    Shards,
}

/// Number of skipped files and documents.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Files and folders in a folder whose names start with a dot; the contents of such a folder are not counted.
    pub hidden: u64,
    /// Files of a folder that are not UTF-8 text, or not regular files.
    pub binary: u64,
    /// Folders of runs and of prepared text in a folder.
    #[serde(default)]
    pub own: u64,
    /// Documents without text.
    pub empty: u64,
}

impl Skipped {
    /// Returns true if nothing was skipped.
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { hidden, binary, own, empty } = self;
        write!(
            f,
            "passed over {binary} files that are no text, {hidden} hidden files or folders, {own} folders of runs, {empty} empty documents"
        )
    }
}

/// Source of documents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Files and folders.
    pub paths: Vec<PathBuf>,
    /// Format of the files.
    pub format: Format,
    /// Field of JSON lines, or column of Parquet, that holds the text.
    pub field: String,
}

/// Content of lines of data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// Texts.
    Texts,
    /// Prompts with completions.
    Pairs,
    /// Turns, for a chat template.
    Conversations,
}

impl Source {
    /// Content of the first line of JSON lines; texts for files of other formats.
    pub fn holds(&self) -> Result<Held, DataError> {
        let (files, _) = self.files()?;
        let Some((path, _)) = files.into_iter().next() else { return Ok(Held::Texts) };
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        let lines = match self.format {
            Format::Auto => [".jsonl", ".ndjson", ".json"].iter().any(|end| name.contains(end)),
            format => format == Format::Jsonl,
        };
        if !lines {
            return Ok(Held::Texts);
        }
        let first = JsonLines::open(path)?.next_value();
        // Invalid JSON is rejected when it is read.
        let Ok(Some((_, first))) = first else { return Ok(Held::Texts) };
        let is = |key: &str, list: bool| first.get(key).is_some_and(|value| value.list().is_some() == list);
        Ok(match () {
            _ if is("messages", true) || is("prompt", true) => Held::Conversations,
            _ if is("prompt", false) || is("completion", false) => Held::Pairs,
            _ => Held::Texts,
        })
    }

    /// Every file, in the order of the documents, with true if it was named explicitly rather than found in a folder;
    /// and the files skipped in the folders.
    pub fn files(&self) -> Result<(Vec<(PathBuf, bool)>, Skipped), DataError> {
        if self.paths.is_empty() {
            return Err(DataError::NoPath);
        }
        let mut files = Vec::new();
        let mut skipped = Skipped::default();
        for path in &self.paths {
            let metadata = std::fs::metadata(path).map_err(DataError::read(path))?;
            match metadata.is_dir() {
                true => files.extend(files_below(path, &mut skipped)?.into_iter().map(|file| (file, false))),
                false if metadata.is_file() => files.push((path.clone(), true)),
                false => return Err(DataError::read(path)(std::io::Error::other("neither a file nor a folder"))),
            }
        }
        Ok((files, skipped))
    }

    /// All documents, one of them in memory at a time.
    pub fn documents(&self) -> Result<Documents, DataError> {
        let (files, skipped) = self.files()?;
        Ok(Documents { files: files.into(), format: self.format, field: self.field.clone(), open: None, skipped })
    }
}

/// Files that identify folders written by this program: those of a run, of prepared text, and of token files.
const OWN: [[&str; 2]; 3] =
    [["config.toml", "metrics.jsonl"], ["facts.json", "tokenizer.json"], ["config.toml", "checkpoints"]];

/// Files in a folder and its subfolders, sorted by path, links followed; hidden ones and output of this program are
/// left out and counted.
pub(super) fn files_below(folder: &Path, skipped: &mut Skipped) -> Result<Vec<PathBuf>, DataError> {
    let Skipped { hidden, binary, own, .. } = skipped;
    let visible = |entry: &walkdir::DirEntry| {
        if entry.depth() == 0 {
            return true;
        }
        let is_hidden = entry.file_name().to_string_lossy().starts_with('.');
        let is_own = !is_hidden
            && entry.file_type().is_dir()
            && OWN.iter().any(|names| names.iter().all(|name| entry.path().join(name).exists()));
        *hidden += u64::from(is_hidden);
        *own += u64::from(is_own);
        !is_hidden && !is_own
    };
    let mut files = Vec::new();
    let walk = walkdir::WalkDir::new(folder).follow_links(true).sort_by_file_name();
    for entry in walk.into_iter().filter_entry(visible) {
        let entry = entry.map_err(|error| DataError::Read {
            path: error.path().unwrap_or(folder).to_path_buf(),
            source: error.into(),
        })?;
        match entry.file_type() {
            kind if kind.is_file() => files.push(entry.into_path()),
            kind => *binary += u64::from(!kind.is_dir()),
        }
    }
    Ok(files)
}

/// Iterator over documents; ends after the first error.
pub struct Documents {
    files: VecDeque<(PathBuf, bool)>,
    format: Format,
    field: String,
    open: Option<Rows>,
    /// Files and documents skipped so far.
    pub skipped: Skipped,
}

/// File being read.
enum Rows {
    Text(TextReader),
    Lines(JsonLines),
    #[cfg(feature = "parquet")]
    Table {
        path: PathBuf,
        rows: parquet::record::reader::RowIter<'static>,
        row: u64,
    },
}

impl Documents {
    fn next_document(&mut self) -> Result<Option<Document>, DataError> {
        loop {
            if let Some(rows) = &mut self.open {
                match rows.next(&self.field)? {
                    Some(document) => return Ok(Some(document)),
                    None => self.open = None,
                }
            }
            let Some((path, named)) = self.files.pop_front() else {
                return Ok(None);
            };
            match self.format_of(&path, named)? {
                Format::Jsonl => self.open = Some(Rows::Lines(JsonLines::open(path)?)),
                Format::Parquet => self.open = Some(open_parquet(path, &self.field)?),
                _ => match TextReader::open(path, named, PIECE)? {
                    Some(reader) => self.open = Some(Rows::Text(reader)),
                    None => self.skipped.binary += 1,
                },
            }
        }
    }

    /// Format of a file, detected from its name and its beginning unless one is given.
    fn format_of(&self, path: &Path, named: bool) -> Result<Format, DataError> {
        if self.format != Format::Auto {
            return Ok(self.format);
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        let plain = [".gz", ".zst"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
        let end = plain.rsplit_once('.').map_or("", |(_, end)| end);
        Ok(match end {
            "jsonl" | "ndjson" => Format::Jsonl,
            "parquet" => Format::Parquet,
            "json" if holds_objects(path, &self.field, named)? => Format::Jsonl,
            _ => Format::Text,
        })
    }
}

/// Maximum number of bytes read to detect the format of a file.
const BEGINNING: u64 = 1 << 20;

/// Returns true if a `.json` file holds a sequence of objects, on lines or in an array. In a file found in a folder the
/// first object must have the text field: others are likely settings of some program.
fn holds_objects(path: &Path, field: &str, named: bool) -> Result<bool, DataError> {
    let mut begin = Vec::new();
    let file = match open(path) {
        Err(DataError::Encoding { .. }) if !named => return Ok(false),
        file => file?,
    };
    file.take(BEGINNING).read_to_end(&mut begin).map_err(DataError::read(path))?;
    let begin = begin.trim_ascii_start();
    if let Some(what) = unread(begin, field).filter(|_| named) {
        return Err(DataError::Encoding {
            path: path.to_path_buf(),
            problem: format!(
                "holds {what}, which has no fixed meaning; write a line {{\"{field}\": \"...\"}} for each document, or set data.format = text to read the file as it stands"
            ),
        });
    }
    let has_field = |json: &[u8]| match serde_json::Deserializer::from_slice(json).into_iter::<Json>().next() {
        Some(Ok(first @ Json::Object(_))) => named || first.get(field).is_some(),
        // The object is longer than the part that was read.
        Some(Err(error)) => error.is_eof() && begin.len() as u64 > BEGINNING / 2,
        _ => false,
    };
    Ok(match begin.first() {
        Some(b'[') => begin[1..].trim_ascii_start().starts_with(b"{") && has_field(&begin[1..]),
        Some(b'{') => {
            let line = begin.split(|byte| *byte == b'\n').next().unwrap_or_default();
            let whole = line.len() < begin.len() || begin.len() as u64 >= BEGINNING / 2;
            // A single object, such as the settings of a program, is text unless it has the field.
            let several = begin[line.len()..].trim_ascii_start().starts_with(b"{");
            match serde_json::from_slice::<Json>(line) {
                Ok(first @ Json::Object(_)) => first.get(field).is_some() || named && several,
                _ => whole && line.len() as u64 >= BEGINNING / 2,
            }
        }
        _ => false,
    })
}

/// Description of JSON that someone may take for documents, though it is no sequence of objects.
fn unread(begin: &[u8], field: &str) -> Option<String> {
    match begin.first()? {
        b'[' => match begin[1..].trim_ascii_start().first()? {
            b'"' => Some("a list of texts".into()),
            b'[' => Some("a list of lists".into()),
            _ => None,
        },
        b'{' => {
            let Ok(Json::Object(members)) = serde_json::from_slice(begin) else { return None };
            let is_list = |value: &Json| match value {
                Json::List(all) => all.first().is_some_and(|first| first.get(field).is_some()),
                _ => false,
            };
            members
                .iter()
                .find(|(_, value)| is_list(value))
                .map(|(key, _)| format!("one object with a list in \"{key}\""))
        }
        _ => None,
    }
}

/// Text in a field of a JSON object.
fn text_field(json: &[u8], field: &str) -> serde_json::Result<Found> {
    let mut json = serde_json::Deserializer::from_slice(json);
    let found = TextField(field).deserialize(&mut json)?;
    json.end().map(|()| found)
}

/// Reads the text in a field of an object and skips all other fields without holding them in memory.
struct TextField<'a>(&'a str);

/// Text, or the problem with it.
type Found = Result<String, String>;

impl<'de> DeserializeSeed<'de> for TextField<'_> {
    type Value = Found;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Found, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for TextField<'_> {
    type Value = Found;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Found, A::Error> {
        let mut found = Err(format!("there is no field \"{}\"", self.0));
        while let Some(key) = map.next_key::<Cow<str>>()? {
            if key != self.0 {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            found = match map.next_value::<Json>()? {
                Json::Text(text) => Ok(text),
                other => Err(format!("field \"{}\" is {other} instead of a text", self.0)),
            };
        }
        Ok(found)
    }
}

impl Iterator for Documents {
    type Item = Result<Document, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.next_document() {
                Ok(Some(document)) if document.text.is_empty() => self.skipped.empty += 1,
                Ok(document) => return document.map(Ok),
                Err(error) => {
                    self.files.clear();
                    self.open = None;
                    return Some(Err(error));
                }
            }
        }
    }
}

impl Rows {
    fn next(&mut self, field: &str) -> Result<Option<Document>, DataError> {
        match self {
            Self::Text(reader) => reader.next(),
            Self::Lines(lines) => {
                let Some((line, found)) = lines.next(|bytes| text_field(bytes, field))? else { return Ok(None) };
                let path = lines.path();
                match found {
                    Ok(text) => Ok(Some(Document { name: format!("{} line {line}", path.display()), text })),
                    Err(problem) => Err(DataError::Field { path: path.to_path_buf(), line, problem }),
                }
            }
            #[cfg(feature = "parquet")]
            Self::Table { path, rows, row } => {
                use parquet::record::Field;
                *row += 1;
                let problem = |problem: String| DataError::Parquet { path: path.clone(), problem };
                let Some(record) = rows.next() else {
                    return Ok(None);
                };
                let record = record.map_err(|error| problem(format!("row {row}: {error}")))?;
                let value = record.get_column_iter().next().map(|(_, value)| value.clone());
                let text = match value {
                    Some(Field::Str(text)) => text,
                    Some(Field::Bytes(bytes)) => String::from_utf8(bytes.data().to_vec())
                        .map_err(|_| problem(format!("row {row}: column \"{field}\" is not UTF-8")))?,
                    Some(Field::Null) => String::new(),
                    _ => {
                        return Err(problem(format!("row {row}: column \"{field}\" is not text")));
                    }
                };
                Ok(Some(Document { name: format!("{} row {row}", path.display()), text }))
            }
        }
    }
}

#[cfg(not(feature = "parquet"))]
fn open_parquet(path: PathBuf, _field: &str) -> Result<Rows, DataError> {
    let problem = "this build reads no Parquet files; build with `--features parquet`, or give other files".to_string();
    Err(DataError::Parquet { path, problem })
}

#[cfg(feature = "parquet")]
fn open_parquet(path: PathBuf, field: &str) -> Result<Rows, DataError> {
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::record::reader::RowIter;
    use parquet::schema::types::Type;
    use std::fs::File;
    use std::sync::Arc;

    let file = File::open(&path).map_err(DataError::read(&path))?;
    let problem = |problem: String| DataError::Parquet { path: path.clone(), problem };
    let reader = SerializedFileReader::new(file).map_err(|error| problem(error.to_string()))?;
    let schema = reader.metadata().file_metadata().schema();
    let column = schema.get_fields().iter().find(|column| column.name() == field).cloned();
    let Some(column) = column else {
        let names: Vec<&str> = schema.get_fields().iter().map(|column| column.name()).collect();
        return Err(problem(format!(
            "there is no column \"{field}\"; name one of {} with data.field",
            names.join(", ")
        )));
    };
    let projection = Type::group_type_builder(schema.name())
        .with_fields(vec![Arc::clone(&column)])
        .build()
        .map_err(|error| problem(error.to_string()))?;
    let rows = RowIter::from_file_into(Box::new(reader))
        .project(Some(projection))
        .map_err(|error| problem(error.to_string()))?;
    Ok(Rows::Table { path, rows, row: 0 })
}

#[cfg(test)]
mod tests;
