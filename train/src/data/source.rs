//! Documents from files and folders.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::json_lines::JsonLines;
use super::text::{PIECE, TextReader};
use super::{DataError, Document};

/// What the files of the data are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// By the end of the name: `.jsonl` and `.ndjson` are JSON lines, `.parquet` is Parquet, a folder of token files is that, all else text.
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

/// What was passed over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Files and folders in a folder whose names begin with a dot; what is in such a folder is not counted.
    pub hidden: u64,
    /// Files of a folder that are not UTF-8 text, or no regular files.
    pub binary: u64,
    /// Documents without a character.
    pub empty: u64,
}

impl Skipped {
    /// Whether nothing was passed over.
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { hidden, binary, empty } = self;
        write!(
            f,
            "passed over {binary} files that are no text, {hidden} hidden files or folders, {empty} empty documents"
        )
    }
}

/// Where documents come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Files and folders.
    pub paths: Vec<PathBuf>,
    /// What the files are.
    pub format: Format,
    /// Field of JSON lines, or column of Parquet, with the text.
    pub field: String,
}

impl Source {
    /// Every file, in the order of the documents, and whether it was named itself rather than found in a folder; and what was
    /// passed over in the folders.
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

/// Files of a folder and the folders in it, sorted by path, links followed; hidden ones are left out and counted.
pub(super) fn files_below(folder: &Path, skipped: &mut Skipped) -> Result<Vec<PathBuf>, DataError> {
    let Skipped { hidden, binary, .. } = skipped;
    let visible = |entry: &walkdir::DirEntry| {
        let visible = entry.depth() == 0 || !entry.file_name().to_string_lossy().starts_with('.');
        *hidden += u64::from(!visible);
        visible
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

/// Documents one after another; ends after the first error.
pub struct Documents {
    files: VecDeque<(PathBuf, bool)>,
    format: Format,
    field: String,
    open: Option<Rows>,
    /// What was passed over so far.
    pub skipped: Skipped,
}

/// A file that is being read.
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
            let end = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
            match (self.format, end.as_str()) {
                (Format::Jsonl, _) | (Format::Auto, "jsonl" | "ndjson") => {
                    self.open = Some(Rows::Lines(JsonLines::open(path)?));
                }
                (Format::Parquet, _) | (Format::Auto, "parquet") => self.open = Some(open_parquet(path, &self.field)?),
                _ => match TextReader::open(path, named, PIECE)? {
                    Some(reader) => self.open = Some(Rows::Text(reader)),
                    None => self.skipped.binary += 1,
                },
            }
        }
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
                let Some((line, value)) = lines.next()? else { return Ok(None) };
                let path = lines.path();
                let problem = match value.get(field) {
                    Some(serde_json::Value::String(text)) => {
                        return Ok(Some(Document {
                            name: format!("{} line {line}", path.display()),
                            text: text.clone(),
                        }));
                    }
                    Some(other) => format!("field \"{field}\" is {other} instead of a text"),
                    None => format!("there is no field \"{field}\""),
                };
                Err(DataError::Field { path: path.to_path_buf(), line, problem })
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
mod tests {
    use super::*;
    #[cfg(feature = "parquet")]
    use std::fs::File;

    fn source(path: &Path) -> Source {
        Source { paths: vec![path.to_path_buf()], format: Format::Auto, field: "text".into() }
    }

    #[test]
    fn a_folder_gives_its_texts_in_order_and_counts_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in [
            ("b.txt", b"second".as_slice()),
            ("a/z.rs", b"first"),
            ("c.bin", b"x\0y"),
            ("d.txt", b""),
            ("e.txt", b"bad \xff"),
            (".hidden", b"hidden"),
            ("f.jsonl", b"{\"text\": \"third\"}\n\n{\"text\": \"fourth\", \"other\": 1}"),
        ] {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        let mut documents = source(dir.path()).documents().unwrap();
        let texts: Vec<String> = documents.by_ref().map(|document| document.unwrap().text).collect();
        assert_eq!(texts, ["first", "second", "third", "fourth"]);
        assert_eq!(documents.skipped, Skipped { hidden: 1, binary: 2, empty: 1 });
    }

    #[test]
    fn errors_name_file_and_line() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let error = source(&path).documents().unwrap().find_map(Result::err).unwrap().to_string();
            assert!(error.contains(name), "{error}");
            error
        };
        assert!(write("a.jsonl", b"{\"text\": \"x\"}\n{\"text\": ").contains("line 2"));
        assert!(write("b.jsonl", b"\n\n{\"body\": \"x\"}").contains("line 3"));
        assert!(write("c.jsonl", b"{\"text\": 7}").contains("instead of a text"));
        assert!(write("d.txt", b"ab\xff").contains("at 2"));
        #[cfg(not(feature = "parquet"))]
        assert!(write("e.parquet", b"PAR1").contains("--features parquet"));
        assert!(source(&dir.path().join("none")).documents().is_err());
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_and_what_is_no_file_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("below");
        std::fs::create_dir(&below).unwrap();
        std::fs::write(dir.path().join("text"), "linked").unwrap();
        std::os::unix::fs::symlink(dir.path().join("text"), below.join("link")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(below.join("socket")).unwrap();
        let mut documents = source(&below).documents().unwrap();
        assert_eq!(documents.next().unwrap().unwrap().text, "linked");
        assert!(documents.next().is_none());
        assert_eq!(documents.skipped.binary, 1);
        assert!(source(&below.join("socket")).documents().is_err());
    }

    #[cfg(feature = "parquet")]
    #[test]
    fn parquet_gives_a_document_a_row() {
        use parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
        use parquet::file::writer::SerializedFileWriter;
        use parquet::schema::parser::parse_message_type;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.parquet");
        let schema = "message rows { required int32 id; required binary story (UTF8); }";
        let schema = std::sync::Arc::new(parse_message_type(schema).unwrap());
        let file = File::create(&path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Default::default()).unwrap();
        for group in 0..2 {
            let mut rows = writer.next_row_group().unwrap();
            let mut column = rows.next_column().unwrap().unwrap();
            column.typed::<Int32Type>().write_batch(&[1, 2], None, None).unwrap();
            column.close().unwrap();
            let mut column = rows.next_column().unwrap().unwrap();
            let texts = [format!("größe {group}"), String::new()].map(|text| ByteArray::from(text.as_str()));
            column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
            column.close().unwrap();
            rows.close().unwrap();
        }
        writer.close().unwrap();
        let rows = Source { field: "story".into(), ..source(&path) };
        let mut documents = rows.documents().unwrap();
        let texts: Vec<String> = documents.by_ref().map(|document| document.unwrap().text).collect();
        assert_eq!(texts, ["größe 0", "größe 1"]);
        assert_eq!(documents.skipped.empty, 2);
        let message = source(&path).documents().unwrap().next().unwrap().unwrap_err().to_string();
        assert!(message.contains("id, story"), "{message}");
        let numbers = Source { field: "id".into(), ..source(&path) };
        let message = numbers.documents().unwrap().next().unwrap().unwrap_err().to_string();
        assert!(message.contains("row 1") && message.contains("not text"), "{message}");
        std::fs::write(&path, b"PAR1 and no more").unwrap();
        assert!(rows.documents().unwrap().next().unwrap().is_err());
    }
}
