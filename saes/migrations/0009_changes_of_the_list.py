"""What the list's counts are remembered under: a row for each statement that writes SAEs or states of jobs."""

from django.db import migrations

CHANGES = """
CREATE TABLE saes_listchange (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, weight bigint NOT NULL DEFAULT 1);
INSERT INTO saes_listchange DEFAULT VALUES;
CREATE FUNCTION saes_list_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN INSERT INTO saes_listchange (weight) VALUES (1); RETURN NULL; END $$;
CREATE TRIGGER saes_list_changed AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON saes_sae
    FOR EACH STATEMENT EXECUTE FUNCTION saes_list_changed();
CREATE TRIGGER saes_list_changed AFTER INSERT OR UPDATE OF state OR DELETE OR TRUNCATE ON jobs_job
    FOR EACH STATEMENT EXECUTE FUNCTION saes_list_changed();
"""
NO_CHANGES = """
DROP TRIGGER saes_list_changed ON jobs_job;
DROP TRIGGER saes_list_changed ON saes_sae;
DROP FUNCTION saes_list_changed();
DROP TABLE saes_listchange;
"""


class Migration(migrations.Migration):
    dependencies = [
        ("jobs", "0002_grant_roles"),
        ("saes", "0008_sorted_by_width_size_l0"),
    ]

    operations = [migrations.RunSQL(CHANGES, NO_CHANGES)]
