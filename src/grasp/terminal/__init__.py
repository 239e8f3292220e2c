"""What a person types and sees: flags, bars, tables, and what each verb prints."""
