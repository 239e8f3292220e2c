"""What each verb shows, one file a verb: it calls the verb, then prints a table or JSON."""
