//! The database's file while it is open: what is asked of it in one transaction each. All of it
//! blocks.

use std::path::Path;

use bytes::Bytes;
use redb::{
    Database, Durability, ReadableDatabase, ReadableTable, Table, TableDefinition, TableError,
};

use super::super::{KeyError, NodeId, Reading, Token, clock_key, token_key};
use crate::private;

/// Key to value.
const COUNTERS: TableDefinition<'_, &[u8], i64> = TableDefinition::new("counters");
/// Token, clock and the database's id, as text, under the names that Redis would have.
const META: TableDefinition<'_, &str, &str> = TableDefinition::new("meta");
/// The database's id: 32 hexadecimal digits, made with it.
const ID_KEY: &str = "tallyd:id";

/// The database and what is known of it.
#[derive(Debug)]
pub struct File {
    database: Database,
    id: String,
}

/// What stands in it, as text.
pub struct Entries {
    /// Its id.
    pub id: String,
    /// The node's token.
    pub token: Option<String>,
    /// The clock.
    pub clock: Option<String>,
}

/// What a batch gave.
pub struct Applied {
    /// In the order of the deltas.
    pub values: Vec<Result<i64, KeyError>>,
    /// That the batch was given.
    pub clock: u64,
}

impl File {
    /// Opens the database, or makes it.
    ///
    /// # Errors
    /// The file cannot be opened, is no database, or is in use.
    pub fn open(path: &Path) -> Result<Self, redb::Error> {
        // The database would be readable by whom the umask lets.
        private::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        let database = Database::create(path)?;
        // Looked for first: where there is no room to write, what is there can be read all the same.
        let id = match find_id(&database)? {
            Some(id) => id,
            None => make_tables(&database)?,
        };
        Ok(Self { database, id })
    }

    /// What a new lane must know.
    pub fn entries(&self, node: NodeId) -> Result<Entries, redb::Error> {
        let meta = self.database.begin_read()?.open_table(META)?;
        Ok(Entries {
            id: self.id.clone(),
            token: text(&meta, &token_key(node))?,
            clock: text(&meta, clock_key())?,
        })
    }

    /// Values and the clock of one moment.
    pub fn read(&self, keys: &[Bytes]) -> Result<Reading, redb::Error> {
        // One read transaction is one moment.
        let read = self.database.begin_read()?;
        let counters = read.open_table(COUNTERS)?;
        let mut values = Vec::with_capacity(keys.len());
        for key in keys {
            values.push(Ok(counters.get(key.as_ref())?.map(|value| value.value())));
        }
        let clock = clock(&read.open_table(META)?)?;
        Ok(Reading { values, clock })
    }

    /// `None`: the token is not `seen`. An error: unknown, as a failed commit may have reached
    /// the disk.
    pub fn apply(
        &self,
        node: NodeId,
        seen: Option<Token>,
        next: Token,
        deltas: &[(Vec<u8>, i64)],
    ) -> Result<Option<Applied>, redb::Error> {
        let mut write = self.database.begin_write()?;
        write.set_durability(Durability::Immediate)?;
        let mut values = Vec::with_capacity(deltas.len());
        let clock = {
            let mut meta = write.open_table(META)?;
            if !move_token(&mut meta, node, seen, next)? {
                return Ok(None);
            }
            let clock = clock(&meta)? + 1;
            meta.insert(clock_key(), clock.to_string().as_str())?;
            let mut counters = write.open_table(COUNTERS)?;
            for (key, amount) in deltas {
                let old = counters
                    .get(key.as_slice())?
                    .map_or(0, |value| value.value());
                match old.checked_add(*amount) {
                    Some(new) => {
                        counters.insert(key.as_slice(), new)?;
                        values.push(Ok(new));
                    }
                    None => values.push(Err(KeyError::Overflow)),
                }
            }
            clock
        };
        write.commit()?;
        Ok(Some(Applied { values, clock }))
    }

    /// `false`: the token is not `seen`. An error: unknown, as above.
    pub fn claim(
        &self,
        node: NodeId,
        seen: Option<Token>,
        next: Token,
    ) -> Result<bool, redb::Error> {
        let mut write = self.database.begin_write()?;
        write.set_durability(Durability::Immediate)?;
        if !move_token(&mut write.open_table(META)?, node, seen, next)? {
            return Ok(false);
        }
        write.commit()?;
        Ok(true)
    }
}

/// `None`: the database is a new one.
fn find_id(database: &Database) -> Result<Option<String>, redb::Error> {
    match database.begin_read()?.open_table(META) {
        Ok(meta) => text(&meta, ID_KEY),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Both tables, so that whoever reads later finds them, and the id in one transaction.
fn make_tables(database: &Database) -> Result<String, redb::Error> {
    let write = database.begin_write()?;
    let id = random_id()?;
    write.open_table(COUNTERS)?;
    write.open_table(META)?.insert(ID_KEY, id.as_str())?;
    write.commit()?;
    Ok(id)
}

/// Sets the token, if it still is what its lane last saw.
fn move_token(
    meta: &mut Table<'_, &str, &str>,
    node: NodeId,
    seen: Option<Token>,
    next: Token,
) -> Result<bool, redb::Error> {
    let key = token_key(node);
    if text(meta, &key)? != seen.map(|token| token.to_string()) {
        return Ok(false);
    }
    meta.insert(key.as_str(), next.to_string().as_str())?;
    Ok(true)
}

fn text(
    meta: &impl ReadableTable<&'static str, &'static str>,
    key: &str,
) -> Result<Option<String>, redb::Error> {
    Ok(meta.get(key)?.map(|value| value.value().to_owned()))
}

fn clock(meta: &impl ReadableTable<&'static str, &'static str>) -> Result<u64, redb::Error> {
    text(meta, clock_key())?.map_or(Ok(0), |text| {
        text.parse()
            .map_err(|_| redb::Error::Corrupted(format!("key {} holds no clock", clock_key())))
    })
}

fn random_id() -> Result<String, redb::Error> {
    let id = getrandom::u64()
        .and_then(|high| Ok((high, getrandom::u64()?)))
        .map_err(|error| redb::Error::Io(std::io::Error::other(error)))?;
    Ok(format!("{:016x}{:016x}", id.0, id.1))
}
